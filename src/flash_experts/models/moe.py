"""The MoE model: GPT-2 with a mixture of experts in some of its blocks.

`flash_experts.models.upcycling` makes it from a dense GPT-2, and turns it back.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GPT2LMHeadModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block, GPT2Model, GPT2PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION, sequence_of_tokens
from flash_experts.models.loading import load_dense
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.moe_layer import (
    EXPERTS_IMPLEMENTATION,
    Experts,
    MoELayer,
    Router,
    SharedExperts,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
)
from flash_experts.models.moe_options import Method, UpcyclingOptions
from flash_experts.models.router import counts_of_all_processes, in_use, routers_of
from flash_experts.models.upcycling import Upcycling, fill_from_dense
from flash_experts.options import options_of


@dataclass
class GPT2MoEOutput(MoeCausalLMOutputWithPast):
    """Output of `GPT2MoEForCausalLM`.

    ``loss`` is the cross-entropy (nats), in training plus the weighted ``aux_loss`` (load balancing, 1 at perfect
    balance) and ``z_loss``, means over MoE layers. ``router_logits`` has a (tokens, E) float32 tensor per MoE layer.
    """

    z_loss: torch.Tensor | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class GPT2MoEBlock(GPT2Block):
    """GPT-2's block with a `MoELayer` where its MLP was."""

    mlp: MoELayer  # type: ignore[assignment]

    def __init__(self, config: GPT2MoEConfig, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.mlp = MoELayer(config)

    def forward(self, *args: Any, token_mask_T: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        in_use(self.mlp, MoELayer).mask_T = token_mask_T  # GPT-2's block passes only hidden states to its MLP
        return super().forward(*args, **kwargs)


class GPT2MoEPreTrainedModel(GPT2PreTrainedModel):
    """Base class with the hooks of transformers."""

    config: GPT2MoEConfig
    config_class = GPT2MoEConfig
    _no_split_modules = ["GPT2Block", "GPT2MoEBlock"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": GPT2Block,
        "attentions": OutputRecorder(GPT2Attention, layer_name=".attn", index=1),
        "cross_attentions": OutputRecorder(GPT2Attention, layer_name=".crossattention", index=1),
        "router_logits": OutputRecorder(Router, index=0),
        "router_choices": OutputRecorder(Router, index=2),
    }
    _keep_in_fp32_modules_strict = {"selection_bias_E"}  # noqa: RUF012
    # transformers would read this from the source of the class's module, and inherit the parent's answer.
    _can_set_experts_implementation_cached_value = True
    _can_set_attn_implementation_cached_value = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, or transformers would skip modules without weights of their own, whose ``c_proj`` GPT-2 scales."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        # GPT-2 scales projections onto the residual stream by 1 / sqrt(their number).
        onto_residual = std / (2 * self.config.n_layer) ** 0.5
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
            for buffer in module.buffers():
                init.zeros_(buffer)
        elif isinstance(module, Experts):
            init.normal_(module.up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=onto_residual)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
        elif isinstance(module, SharedExperts):
            init.normal_(module.c_proj.weight, mean=0.0, std=onto_residual)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            warnings.warn(
                "use_reentrant=True would lose the gradient of the router's losses: checkpointing with "
                "use_reentrant=False, which recomputes the same",
                stacklevel=3,
            )
            gradient_checkpointing_func = partial(checkpoint, **(options | {"use_reentrant": False}))
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or ATTENTION_IMPLEMENTATION, is_init_check)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)


class GPT2MoEModel(GPT2MoEPreTrainedModel, GPT2Model):
    """The transformer without its head."""

    def __init__(self, config: GPT2MoEConfig):
        # Not GPT2Model.__init__, which would build every block dense first.
        GPT2PreTrainedModel.__init__(self, config)
        self.embed_dim = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, self.embed_dim)
        self.wpe = nn.Embedding(config.max_position_embeddings, self.embed_dim)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h: nn.ModuleList = nn.ModuleList(
            GPT2MoEBlock(config, i) if config.is_moe_layer(i) else GPT2Block(config, layer_idx=i)
            for i in range(config.num_hidden_layers)
        )
        self.ln_f = nn.LayerNorm(self.embed_dim, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self._attn_implementation = config._attn_implementation
        self.post_init()


class GPT2MoEForCausalLM(GPT2MoEPreTrainedModel, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with experts. Generation, KV caches, checkpoints, PEFT and trainers of transformers work.

    PEFT trains routers by ``modules_to_save=["router"]`` or ``target_parameters=["router.weight"]``, experts by
    ``target_parameters=["experts.up_proj", "experts.down_proj"]``; then the attention must be there too, as
    ``"c_attn.weight"``, not in ``target_modules``.
    """

    def __init__(self, config: GPT2MoEConfig):
        GPT2PreTrainedModel.__init__(self, config)
        self.transformer = GPT2MoEModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> GPT2MoEOutput:
        """As `GPT2LMHeadModel.forward`, with the router's logits and losses by ``output_router_logits``.

        In a packed sequence each document restarts its ``position_ids``: give no mask, and ``use_cache=False``, without
        which transformers' ``sdpa`` and ``eager`` attention do not keep documents apart. With ``num_items_in_batch``
        the loss is a sum divided by it; the router's losses are weighted by this micro-batch's share of the items.
        """
        # transformers' generate and Trainer need every argument by name.
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        wants_routing = output_router_logits or (self.training and labels is not None)
        mask_T = _padding_mask(attention_mask, inputs_embeds if input_ids is None else input_ids)
        if past_key_values is not None:  # transformers 5.24 calls it cache, and rejects both names at once
            kwargs["past_key_values"] = past_key_values
        kwargs |= {"position_ids": position_ids, "use_cache": use_cache}
        kwargs |= self._routing_arguments(mask_T, **kwargs)
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            output_router_logits=wants_routing,
            output_router_choices=wants_routing,
            return_dict=True,  # whatever the configuration says
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss, aux_loss, z_loss = self._losses(outputs, logits, labels, mask_T, wants_routing, **kwargs)
        return GPT2MoEOutput(
            loss=loss,
            logits=logits,
            aux_loss=aux_loss,
            z_loss=z_loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )

    def _losses(
        self,
        outputs: Any,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        mask_T: torch.Tensor | None,
        wants_routing: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Total, auxiliary and z-loss."""
        loss = aux_loss = z_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        if wants_routing:
            aux_loss, z_loss = self._router_losses(outputs, mask_T, **kwargs)
            if loss is not None and labels is not None and self.training:
                weighted = self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
                loss = loss + weighted * _share_of_items(labels, **kwargs)
        return loss, aux_loss, z_loss

    def _router_losses(
        self, outputs: Any, mask_T: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Auxiliary loss and z-loss, means over MoE layers; records the routing of training steps."""
        logits, choices, scope = outputs.router_logits, outputs.router_choices, self.config.router_aux_loss_scope
        z = torch.stack([router_z_loss(logits_TE, mask_T) for logits_TE in logits])
        routers = list(routers_of(self).values())
        if self.training:
            for router, logits_TE, chosen in zip(routers, logits, choices, strict=True):
                router.record(logits_TE, chosen, mask_T)
        if self.config.routing == "expert_choice":
            return z.new_ones(()), z.mean()  # every expert has the same load: E * sum_e P_e / E = 1
        scoring = self.config.scoring_func
        pairs = list(zip(logits, choices, strict=True))
        if scope == "sequence":
            sequences = sequence_of_tokens(outputs.last_hidden_state, **kwargs)
            aux = [sequence_balancing_loss(*pair, *sequences, mask_T, scoring) for pair in pairs]
        else:
            is_global = self.training and scope == "global_batch"
            counts = counts_of_all_processes(routers) if is_global else [None] * len(pairs)
            aux = [load_balancing_loss(*pair, mask_T, scoring, of) for pair, of in zip(pairs, counts, strict=True)]
        return torch.stack(aux).mean(), z.mean()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ValueError with expert choice, unless ``config.allow_noncausal_generation``."""
        self._check_generation()
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    @property
    def may_generate(self) -> bool:
        """False with expert choice, unless ``config.allow_noncausal_generation``."""
        return self.config.has_causal_routing or self.config.allow_noncausal_generation

    def _check_generation(self) -> None:
        if not self.may_generate:
            raise ValueError(
                "expert choice is not causal: each expert chooses among all tokens, later ones too, so this model "
                "cannot generate as it was trained. Take routing='token_choice', or set "
                "config.allow_noncausal_generation = True (in the config.json of a saved model: true)"
            )

    def _routing_arguments(
        self,
        mask_T: torch.Tensor | None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        cache: Any = None,  # past_key_values from transformers 5.24 on
        **_: Any,
    ) -> dict[str, Any]:
        """What blocks need where tokens compete for experts."""
        arguments: dict[str, Any] = {}
        if mask_T is not None and (not self.config.has_causal_routing or self.config.capacity_factor is not None):
            arguments["token_mask_T"] = mask_T
        if not self.config.has_causal_routing and (use_cache or past_key_values is not None or cache is not None):
            self._check_generation()
        if not self.may_generate:
            arguments["use_cache"] = False
        return arguments

    def save_pretrained(self, save_directory: Any, *args: Any, for_hub: bool = False, **kwargs: Any) -> None:
        """With ``for_hub`` also saves the code, for ``trust_remote_code=True`` without flash-experts."""
        if for_hub and kwargs.get("push_to_hub"):  # it would upload the folder before the code is there
            raise ValueError("save_pretrained takes for_hub or push_to_hub: upload the folder with `hf upload`")
        super().save_pretrained(save_directory, *args, **kwargs)
        if for_hub:
            from flash_experts.models.hub import add_code  # which reads this file: seldom needed

            add_code(Path(save_directory))

    @classmethod
    def from_dense(
        cls,
        dense: GPT2LMHeadModel | str | Path,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        moe_layer_freq: int = 2,
        method: Method = "copy",
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Sparse upcycling (Komatsuzaki et al. 2022): an MoE model whose experts come from the MLPs of a dense one.

        `flash_experts.models.upcycling` describes the methods; ``copy`` keeps the dense model's logits, up to rounding.

        Args:
            dense: a GPT-2, which is left as it is; or a folder or hub id, of which never more than one layer is in
                memory next to the new model.
            num_experts: E, or E / g for experts of granularity g.
            num_experts_per_tok: k, or k / g.
            dtype: None is that of a given model, and float32 for a folder. In bfloat16 (steps of up to 0.8%) a
                ``noise_scale`` under 0.01 mostly rounds away.
            **options: fields of `UpcyclingOptions` and of `GPT2MoEConfig`.

        Raises:
            ValueError: ``dense`` is not a dense GPT-2, or a field is wrong.
        """
        own = {name: options.pop(name) for name in options_of(UpcyclingOptions).keys() & options.keys()}
        upcycling = Upcycling(method=method, **own)
        is_loaded_here = not isinstance(dense, GPT2LMHeadModel)
        if not isinstance(dense, GPT2LMHeadModel | str | Path):
            raise ValueError(f"from_dense takes a dense GPT-2 or its folder, not a {type(dense).__name__}")
        if not isinstance(dense, GPT2LMHeadModel):
            dense = load_dense(dense, dtype or torch.float32)
        if isinstance(dense, GPT2MoEForCausalLM):
            raise ValueError("the model has experts already: from_dense takes a dense GPT-2")
        sizes = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
        config = upcycling.config(dense.config, moe_layer_freq=moe_layer_freq, **sizes, **options)
        was_training, generation_config = dense.training, copy.deepcopy(dense.generation_config)
        # No initialisation here, so the memory of the weights is first touched when they are filled.
        with init.no_init_weights(), torch.device(dense.device):
            model = cls(config)
        model = nn.Module.to(model, dtype=dtype or dense.dtype)
        fill_from_dense(model, dense, upcycling, take=is_loaded_here)
        model.generation_config = generation_config
        return model.train(was_training)


def _padding_mask(attention_mask: torch.Tensor | None, inputs: torch.Tensor | None) -> torch.Tensor | None:
    """(T,), true at real tokens; None if the mask has another shape (with a cache it covers the past)."""
    if attention_mask is None or inputs is None or attention_mask.shape != inputs.shape[:2]:
        return None
    return attention_mask.reshape(-1).bool()


def _share_of_items(
    labels: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor | float:
    """This micro-batch's share of the step's labels, by which router losses average under gradient accumulation."""
    if num_items_in_batch is None:
        return 1.0
    predicted = labels[..., 1:] if shift_labels is None else shift_labels  # nothing predicts the first token
    return (predicted != -100).sum() / num_items_in_batch
