"""GPT-2 with a mixture of experts in some of its blocks, and its making from a dense GPT-2 (sparse upcycling)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block, GPT2Model, GPT2PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION
from flash_experts.models.loading import FUSED_ACTIVATIONS, load_dense
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import (
    EXPERTS_IMPLEMENTATION,
    Experts,
    MoELayer,
    TopKRouter,
    load_balancing_loss,
    router_z_loss,
)


@dataclass
class GPT2MoEOutput(MoeCausalLMOutputWithPast):
    """What `GPT2MoEForCausalLM` returns: transformers' MoE output and the router z-loss.

    Attributes:
        loss: cross-entropy (nats) and, in training, the weighted balancing and z-losses.
        aux_loss: load-balancing loss, mean over MoE layers, unweighted; 1 at perfect balance.
        z_loss: router z-loss, mean over MoE layers, unweighted.
        router_logits: one (tokens, E) float32 tensor for each MoE layer.
    """

    z_loss: torch.Tensor | None = None


class GPT2MoEBlock(GPT2Block):
    """GPT-2's block with a `MoELayer` where its MLP was."""

    def __init__(self, config: GPT2MoEConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.mlp = MoELayer(config)  # type: ignore[assignment]


class GPT2MoEPreTrainedModel(GPT2PreTrainedModel):
    """What transformers asks of our classes: configuration, initialisation, defaults, what may be recorded."""

    config: GPT2MoEConfig
    config_class = GPT2MoEConfig
    _no_split_modules = ["GPT2Block", "GPT2MoEBlock"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GPT2Block,
        "attentions": OutputRecorder(GPT2Attention, layer_name=".attn", index=1),
        "router_logits": OutputRecorder(TopKRouter, index=0),
        "router_choices": OutputRecorder(TopKRouter, index=2),
    }
    # transformers finds this out by reading the source of the class's module, and keeps a parent's answer.
    _can_set_experts_implementation_cached_value = True
    _can_set_attn_implementation_cached_value = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, TopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            for counts in (module.selection_bias_E, module.step_counts_E, module.interval_counts_E):
                init.zeros_(counts)
            init.zeros_(module.interval_sums)
        elif isinstance(module, Experts):
            init.normal_(module.up_proj, mean=0.0, std=std)
            # As GPT-2's other projections onto the residual stream: smaller by the root of their number.
            init.normal_(module.down_proj, mean=0.0, std=std / (2 * self.config.n_layer) ** 0.5)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or ATTENTION_IMPLEMENTATION, is_init_check)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)


class GPT2MoEModel(GPT2MoEPreTrainedModel, GPT2Model):
    """The transformer without its head. Its forward is GPT-2's own."""

    def __init__(self, config: GPT2MoEConfig):
        # Not GPT2Model.__init__: that would build every block dense before ours replace some.
        GPT2PreTrainedModel.__init__(self, config)
        self.embed_dim = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, self.embed_dim)
        self.wpe = nn.Embedding(config.max_position_embeddings, self.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h: nn.ModuleList = nn.ModuleList(self._block(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self._attn_implementation = config._attn_implementation
        self.post_init()

    @staticmethod
    def _block(config: GPT2MoEConfig, layer_idx: int) -> GradientCheckpointingLayer:
        if config.is_moe_layer(layer_idx):
            return GPT2MoEBlock(config, layer_idx)
        return GPT2Block(config, layer_idx=layer_idx)


class GPT2MoEForCausalLM(GPT2MoEPreTrainedModel, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with experts: generation, caches, checkpoints, PEFT and trainers are transformers' own."""

    def __init__(self, config: GPT2MoEConfig):
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = GPT2MoEModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> GPT2MoEOutput:
        """As `GPT2LMHeadModel.forward`, and the router's part.

        Args:
            input_ids: (B, S) tokens.
            attention_mask: (B, S), 0 at padding, which the router's losses leave out.
            labels: (B, S), shifted here; -100 is ignored. With ``num_items_in_batch`` the loss is a sum divided by
                it, and the balancing losses count by this batch's share of those items.
            output_router_logits: return router_logits, aux_loss and z_loss; None follows the configuration.
            logits_to_keep: positions that get logits: the last n, or the positions in a tensor; 0 is all.
            **kwargs: ``position_ids``, ``past_key_values``, ``use_cache``, ``cu_seq_lens_q`` and the like.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        trains_router = self.training and labels is not None
        wants_routing = output_router_logits or trains_router
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            output_router_logits=wants_routing,
            output_router_choices=wants_routing,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        aux_loss = z_loss = loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        if wants_routing:
            mask_T = _padding_mask(attention_mask, hidden)
            aux_loss, z_loss = self._router_losses(outputs.router_logits, outputs.router_choices, mask_T)
            if loss is not None and labels is not None and trains_router:
                weighted = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
                loss = loss + weighted * _share_of_items(labels, **kwargs)
        return GPT2MoEOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            z_loss=z_loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def _router_losses(
        self,
        logits: tuple[torch.Tensor, ...],
        choices: tuple[torch.Tensor, ...],
        mask_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Balancing and z-loss, each the mean over MoE layers; counts the routing of training steps."""
        layers = list(zip(logits, choices, strict=True))
        if self.training:
            routers = (module for module in self.modules() if isinstance(module, TopKRouter))
            for router, (logits_TE, experts_TK) in zip(routers, layers, strict=True):
                router.record(logits_TE, experts_TK, mask_T)
        aux = torch.stack([load_balancing_loss(logits_TE, experts_TK, mask_T) for logits_TE, experts_TK in layers])
        z = torch.stack([router_z_loss(logits_TE, mask_T) for logits_TE, _ in layers])
        return aux.mean(), z.mean()

    @classmethod
    def from_dense(
        cls,
        dense: GPT2LMHeadModel | str | Path,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        moe_layer_freq: int = 2,
        **config_fields: Any,
    ) -> GPT2MoEForCausalLM:
        """Sparse upcycling (Komatsuzaki et al. 2022): every expert starts as a copy of the dense MLP.

        The gates of a token sum to one, so the new model's logits are the dense model's, to rounding (at most 1e-5
        apart in float32), for every number of experts and of experts per token. The routers start at random.

        Args:
            dense: a GPT-2, a folder that `save_pretrained` wrote, or a hub id. It is left as it is.
            num_experts: E.
            num_experts_per_tok: k.
            moe_layer_freq: 1 for experts in every block, 2 for every other.
            **config_fields: more fields of `GPT2MoEConfig`.

        Raises:
            ValueError: ``dense`` is no dense GPT-2, cannot be loaded, or a field is wrong.
        """
        if not isinstance(dense, GPT2LMHeadModel):
            dense = load_dense(dense)
        if isinstance(dense, GPT2MoEForCausalLM):
            raise ValueError("the model has experts already: from_dense takes a dense GPT-2")
        config = _moe_config(
            dense.config,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            moe_layer_freq=moe_layer_freq,
            **config_fields,
        )
        model: GPT2MoEForCausalLM = nn.Module.to(cls(config), device=dense.device, dtype=dense.dtype)
        missing, unexpected = model.load_state_dict(_upcycled_weights(dense, config), strict=False)
        assert not unexpected and all(".router." in name for name in missing), (missing, unexpected)
        model.generation_config = dense.generation_config
        return model.train(dense.training)


def _moe_config(dense: GPT2Config, **fields: Any) -> GPT2MoEConfig:
    """The dense model's configuration with experts; its slow spelling of the activation gives way to the fused one."""
    inherited = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        inherited.pop(key, None)
    activation = inherited["activation_function"]
    inherited["activation_function"] = FUSED_ACTIVATIONS.get(activation, activation)
    config = GPT2MoEConfig(**(inherited | fields))
    dense_size = dense.n_inner if dense.n_inner is not None else 4 * dense.n_embd
    if config.expert_size != dense_size:
        raise ValueError(
            f"copied experts have the dense layer's {dense_size} hidden units, not moe_intermediate_size = "
            f"{config.expert_size}: leave it out"
        )
    if config.num_experts_per_tok > 1 and not config.norm_topk_prob:
        raise ValueError("norm_topk_prob=False would change the dense model's output: leave it true for upcycling")
    return config


def _upcycled_weights(dense: GPT2LMHeadModel, config: GPT2MoEConfig) -> dict[str, torch.Tensor]:
    """The dense weights under the MoE's names: E copies (views, no memory) of the MLP of each block with experts."""
    renamed = {"c_fc.weight": "up_proj", "c_fc.bias": "up_proj_bias"}
    renamed |= {"c_proj.weight": "down_proj", "c_proj.bias": "down_proj_bias"}
    weights = {}
    for name, tensor in dense.state_dict().items():
        prefix, is_mlp, field = name.partition(".mlp.")
        if is_mlp and config.is_moe_layer(int(prefix.rsplit(".", 1)[1])):
            weights[f"{prefix}.mlp.experts.{renamed[field]}"] = tensor.expand(config.num_experts, *tensor.shape)
        else:
            weights[name] = tensor
    return weights


def _padding_mask(attention_mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """(T,) true at tokens that are no padding; None if the mask does not tell (with a cache it covers the past too)."""
    if attention_mask is None or attention_mask.shape != hidden.shape[:2]:
        return None
    return attention_mask.reshape(-1).bool()


def _share_of_items(
    labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None = None, **_: Any
) -> torch.Tensor | float:
    """This batch's part of the labels of an optimizer step, so that accumulated router losses average."""
    if num_items_in_batch is None:
        return 1.0
    return (labels != -100).sum() / num_items_in_batch


AutoConfig.register(GPT2MoEConfig.model_type, GPT2MoEConfig)
AutoModelForCausalLM.register(GPT2MoEConfig, GPT2MoEForCausalLM)
