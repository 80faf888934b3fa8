"use strict";
// Tables sort by a column's name and narrow as one types; snippets can be copied; what has ended says so.
(() => {
  const make = (name, attributes = {}, text = null) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    return made;
  };

  // An entry of a table is one tbody: its row, and perhaps a second one that explains it. Of many that fit a search the
  // first hundred are shown until one asks for all: laying out a thousand rows takes a browser a quarter of a second.
  const ROOM = 100;

  function enhance(table) {
    const heads = [...table.tHead.rows[0].cells], choice = document.querySelector(`select[data-sorts="${table.id}"]`);
    const input = document.querySelector(`input[data-filters="${table.id}"]`), told = document.getElementById(`${table.id}-shown`);
    let entries = [...table.tBodies].map((body, index) => ({ body, index, text: (body.dataset.search ?? "").toLowerCase() }));
    let sorted = { column: -1, down: false }, room = ROOM;
    const more = make("button", { type: "button", class: "more" });
    more.addEventListener("click", () => { room = Infinity; show(); });

    function show() {
      const words = (input?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
      let fitting = 0;
      for (const { body, text } of entries) {
        const fits = words.every(word => text.includes(word)), hidden = !fits || fitting >= room;
        fitting += fits;
        if (body.hidden !== hidden) body.hidden = hidden;
      }
      const count = number => number.toLocaleString("en");
      if (told) told.textContent = `${count(fitting)} of ${count(entries.length)}`;
      more.textContent = `Show all ${count(fitting)}`;
      more.hidden = fitting <= room;
    }

    function sort(column, down) {
      const numeric = heads[column].classList.contains("n");
      for (const entry of entries) {
        const cell = entry.body.rows[0].cells[column], text = cell.dataset.value ?? cell.textContent.trim();
        entry.key = text === "" ? null : numeric ? Number(text) : text;
      }
      const words = new Intl.Collator("en", { numeric: true });
      entries.sort((a, b) => {   // what is not known stands last, up or down; equals keep the order of the page
        if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.index - b.index;
        const order = numeric ? a.key - b.key : words.compare(a.key, b.key);
        return (down ? -order : order) || a.index - b.index;
      });
      show();
      table.append(...entries.map(({ body }) => body));
      heads.forEach((head, index) => { if (head.hasAttribute("aria-sort"))
        head.setAttribute("aria-sort", index !== column ? "none" : down ? "descending" : "ascending"); });
      sorted = { column, down };
      if (choice) choice.value = String(column);
    }

    heads.forEach((head, column) => {
      if (!head.hasAttribute("aria-sort")) return;
      const button = make("button", { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      const numeric = head.classList.contains("n");
      button.addEventListener("click", () => sort(column, sorted.column === column ? !sorted.down : numeric));
      if (choice) choice.append(make("option", { value: column }, head.dataset.title ?? button.textContent));
    });
    choice?.addEventListener("change", () => sort(Number(choice.value), heads[choice.value].classList.contains("n")));
    input?.addEventListener("input", () => { room = ROOM; show(); });
    (table.closest(".scroll") ?? table).after(more);
    show();
  }

  function copying(snippet) {
    const button = make("button", { type: "button", class: "copy" }, "Copy");
    button.addEventListener("click", async () => {
      const code = snippet.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {   // a page from a folder may not write the clipboard: then the text is marked, to be copied by hand
        getSelection().selectAllChildren(code);
        button.textContent = "Marked";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    snippet.append(button);
  }

  document.querySelectorAll("table[data-sortable]").forEach(enhance);
  document.querySelectorAll(".snippet").forEach(copying);
  for (const end of document.querySelectorAll("[data-ends]"))
    if (Date.parse(end.dataset.ends) <= Date.now()) { end.classList.add("ended"); end.append(" (ended)"); }
})();
