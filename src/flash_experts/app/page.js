// The page's own script: what only a browser can do. Text of the server is shown as text, never as markup.
window.flashExperts = {
  KEY: 'flash-experts:kept',
  LARGEST: 48000,  // bytes of a file of cards: it has to fit into the body of a request
  number: 0,       // of the last message of the server that was remembered
  link: null,      // the query that makes the names on the table again
  sideSaid: 0,     // when screen readers were last informed of a side that is compared
  pressed: null,   // the last button pressed in our HTML
  chosen: null,    // the name whose card is open

  // Called when the page opens: what the server needs to restore it.
  opened(kept, query) {
    const options = document.querySelector('#fe-options > button.label-wrap.open');
    if (options && matchMedia('(max-width: 760px)').matches) options.click();
    this.live('fe-announced');
    this.live('fe-said', 'fe-hidden');
    try { kept = localStorage.getItem(this.KEY) || ''; } catch { kept = ''; }
    return [kept.length < 60000 ? kept : '', location.search];
  },

  // Puts settings into the address and kept names into the storage.
  remember(text) {
    if (!text) return;
    const {number, address, link, kept} = JSON.parse(text);
    if (number < this.number) return; // an answer that was overtaken by a later one
    this.number = number;
    if (link !== null) this.link = link;
    if (address !== null) this.visit(address);
    try { localStorage.setItem(this.KEY, JSON.stringify(kept)); } catch { /* storage is full or not allowed */ }
  },

  // A new entry of the browser's history for other settings than those of the address. Its state has the link that
  // makes its names again.
  visit(address) {
    const [before, now] = [location.search, address].map((query) => new URLSearchParams(query));
    for (const query of [before, now]) {
      for (const name of ['v', 'view', '__theme']) query.delete(name); // the last two are Gradio's
      query.sort();
    }
    if (!before.has('model')) now.delete('model'); // the first one, by default
    const url = location.pathname + (address ? '?' + address : '');
    const change = before.toString() === now.toString() ? 'replaceState' : 'pushState';
    history[change]({link: this.link}, '', url);
  },

  // Back and Forward: the server opens the request of the entry, or the settings of its address.
  follow(trigger) {
    addEventListener('popstate', (event) => {
      this.link = null; // until the server answers
      trigger('click', {query: location.search, link: event.state?.link ?? ''});
    });
  },

  announce(message) {
    const place = this.live('fe-announced');
    place.textContent = message;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { place.textContent = ''; }, 2500);
  },

  // Tells screen readers alone.
  say(message) {
    this.live('fe-said', 'fe-hidden').textContent = message;
  },

  // A request starts: its status line changes with each name, and is read out at the end alone.
  started(values) {
    this.say('Making names');
    return values;
  },

  // Says what a status line has to say; of two sides that end together, both. Gradio changes a line in place.
  speak(element) {
    const isSide = element.closest('[id^=fe-status-]') !== null;
    let last = '';
    new MutationObserver(() => {
      const text = element.querySelector('[data-announced]')?.dataset.announced ?? '';
      if (text && text !== last) {
        const before = isSide && Date.now() - this.sideSaid < 1000 ? `${this.live('fe-said').textContent}; ` : '';
        this.say(before + text);
        if (isSide) this.sideSaid = Date.now();
      }
      last = text;
    }).observe(element, {childList: true, subtree: true, attributeFilter: ['data-announced']});
  },

  // A place whose changes screen readers read out; they miss the first text of a place that comes with it.
  live(id, look = '') {
    let place = document.getElementById(id);
    if (!place) {
      place = document.body.appendChild(document.createElement('div'));
      place.id = id;
      place.className = look;
      place.setAttribute('role', 'status');
    }
    return place;
  },

  async copy(text, message) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // pages over plain HTTP have no clipboard, but this old command
      const focused = document.activeElement;
      const field = document.body.appendChild(document.createElement('textarea'));
      field.value = text;
      field.select();
      const done = document.execCommand('copy');
      field.remove();
      focused?.focus({preventScroll: true});
      if (!done) return this.announce('The browser does not allow copying: select the text instead');
    }
    this.announce(message);
  },

  copyKept() {
    const names = [...document.querySelectorAll('#fe-table .fe-kept .fe-name')].map((name) => name.textContent);
    if (!names.length) return this.announce('Keep a name first: press the ☆ next to it');
    this.copy(names.join('\n') + '\n', names.length === 1 ? 'Copied 1 name' : `Copied ${names.length} names`);
  },

  copyLink() {
    const query = this.link === null ? location.search.slice(1) : this.link;
    this.copy(location.origin + location.pathname + (query ? '?' + query : ''), 'Copied the link');
  },

  // The text of a file that the user chooses, for the field of cards; what is in the field stays if there is none.
  readFile(before) {
    const field = Object.assign(document.createElement('input'), {type: 'file', accept: '.csv,.tsv,.txt,.json'});
    const read = async () => {
      try {
        const [file] = field.files;
        const text = file.size > this.LARGEST ? null
          : new TextDecoder('utf-8', {fatal: true}).decode(await file.arrayBuffer());
        if (text !== null && new Blob([JSON.stringify(text)]).size <= this.LARGEST) {
          this.announce(`Read ${file.name}: press Make names for each card`);
          return text;
        }
        this.announce(`${file.name} has more than ${this.LARGEST / 1000} kB: leave out columns such as rules text`);
      } catch {
        this.announce('This file cannot be read as UTF-8 text: save it as CSV UTF-8');
      }
      return before;
    };
    return new Promise((resolve) => {
      field.addEventListener('change', () => resolve(read()));
      field.addEventListener('cancel', () => resolve(before));
      field.click();
    });
  },

  download(text) {
    if (!text) return this.announce('Name a set first: press Make names for each card');
    const {name, text: written, base64} = JSON.parse(text);
    const content = written ?? Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([content], {type: 'text/plain;charset=utf-8'}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  },

  // Buttons in our HTML carry their action as data attributes. Each answer replaces the HTML, so focus is restored.
  watch(element, trigger) {
    let key = null;
    element.addEventListener('focusin', (event) => { key = event.target.dataset.key ?? null; });
    element.addEventListener('click', (event) => {
      const button = event.target.closest('button[data-do]');
      if (!button) return;
      key = button.dataset.key;
      const {do: action, name} = button.dataset;
      if (action === 'copy') { this.copy(name, `Copied ${name}`); return; }
      this.pressed = action;
      if (action === 'inspect') { this.chosen = name; this.from = element; this.mark(); }
      trigger(action === 'word' ? 'submit' : 'click', {...button.dataset}); // submit: a request for names
    });
    new MutationObserver(() => {
      this.mark();
      if (key === null || document.activeElement !== document.body) return;
      const button = element.querySelector(`[data-key="${CSS.escape(key)}"]`);
      if (button) button.focus({preventScroll: true});
    }).observe(element, {childList: true, subtree: true});
  },

  mark() {
    for (const row of document.querySelectorAll('.fe-names tr[data-row]'))
      row.classList.toggle('fe-chosen', row.dataset.row === this.chosen);
  },

  // After a name was pressed: its card gets the focus, and does not cover the name.
  showPanel() {
    if (this.pressed !== 'inspect') return;
    setTimeout(() => {
      document.getElementById('fe-looked')?.focus({preventScroll: true});
      const side = document.getElementById('fe-side'), row = this.from.querySelector('tr.fe-chosen');
      if (!row || getComputedStyle(side).position !== 'fixed') return;
      const hidden = row.getBoundingClientRect().bottom - side.getBoundingClientRect().top;
      if (hidden > 0) window.scrollBy(0, hidden + 8);
    }, 50);
  },

  // After the card was closed: the focus returns to the name.
  closePanel() {
    if (this.pressed !== 'close') return;
    const key = this.chosen;
    this.chosen = null;
    this.mark();
    this.from?.querySelector(`.fe-name[data-name="${CSS.escape(key)}"]`)?.focus({preventScroll: true});
  },
};
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !event.target.closest('input, textarea')) document.querySelector('#fe-panel [data-do=close]')?.click();
});
