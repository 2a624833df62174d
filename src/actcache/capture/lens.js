"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const sections = [...document.querySelectorAll("section")];
  const chooser = document.getElementById("prompt");
  const metric = document.getElementById("metric");
  const details = document.getElementById("details");
  const ends = document.querySelectorAll(".legend span");
  const cells = sections.map((section) => [...section.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("td")]));
  const focus = cells.map((rows) => [rows.length - 1, data.layers.length - 1]);
  let shown = 0;

  const text = (id) => data.texts[id] ?? String(id);
  const number = (x) => (x === null ? "\u2013" : x.toFixed(3));
  const add = (parent, name, content) => {
    const made = parent.appendChild(document.createElement(name));
    if (content !== undefined) made.textContent = content;
    return made;
  };

  // A value from 0 to 1 for the colour, and what is written in the cell.
  const readers = {
    probability: (p, r, l) => [p.probabilities[r][l][0], number(p.probabilities[r][l][0])],
    entropy: (p, r, l) => [p.entropy[r][l] / (data.most.entropy || 1), number(p.entropy[r][l])],
    kl: (p, r, l) => [p.kl[r][l] / (data.most.kl || 1), number(p.kl[r][l])],
    chance: (p, r, l, t) => [p.chances[r][l][t], number(p.chances[r][l][t])],
    rank: (p, r, l, t) => [1 - Math.log1p(p.ranks[r][l][t]) / Math.log(data.vocabulary), "#" + p.ranks[r][l][t]],
  };
  const limits = {
    probability: () => ["0", "1"],
    entropy: () => ["0", number(data.most.entropy)],
    kl: () => ["0", number(data.most.kl)],
    chance: () => ["0", "1"],
    rank: () => ["#" + (data.vocabulary - 1), "#0"],
  };

  const paint = () => {
    const [kind, place] = metric.value.split(" ");
    const prompt = data.prompts[shown];
    cells[shown].forEach((row, r) =>
      row.forEach((cell, l) => {
        const [value, said] = readers[kind](prompt, r, l, Number(place));
        const share = Math.min(1, Math.max(0, value ?? 0));
        cell.style.setProperty("--v", share.toFixed(3));
        cell.classList.toggle("s", share > 0.66);
        cell.lastElementChild.textContent = said;
      })
    );
    limits[kind]().forEach((said, i) => (ends[i].textContent = said));
  };

  const tell = (r, l) => {
    const prompt = data.prompts[shown];
    details.textContent = "";
    const heading = add(details, "h2");
    heading.append(`layer ${data.layers[l]}, ${data.counted} ${prompt.positions[r]}`);
    if (prompt.tokens[r] >= 0) {
      heading.append(", behind ");
      add(heading, "bdi", text(prompt.tokens[r]));
    }
    const facts = add(details, "dl");
    const fact = (name, value) => {
      const term = add(facts, "dt");
      add(term, "bdi", name);
      add(facts, "dd", value);
    };
    fact("entropy (nats)", number(prompt.entropy[r][l]));
    if (prompt.kl) fact("KL(final || layer) (nats)", number(prompt.kl[r][l]));
    data.chosen.forEach((id, t) => fact(text(id), `${number(prompt.chances[r][l][t])}, rank ${prompt.ranks[r][l][t]}`));
    const list = add(details, "ol");
    prompt.best[r][l].forEach((id, k) => {
      const chance = prompt.probabilities[r][l][k];
      const item = add(list, "li");
      item.style.setProperty("--w", `${(100 * chance).toFixed(1)}%`);
      add(item, "bdi", text(id));
      add(item, "span", number(chance));
    });
  };

  const go = (r, l, take) => {
    const rows = cells[shown];
    const [was, at] = focus[shown];
    rows[was][at].tabIndex = -1;
    const row = Math.min(rows.length - 1, Math.max(0, r));
    const layer = Math.min(data.layers.length - 1, Math.max(0, l));
    focus[shown] = [row, layer];
    rows[row][layer].tabIndex = 0;
    if (take) rows[row][layer].focus();
    tell(row, layer);
  };

  const steps = {
    ArrowUp: (r, l) => [r - 1, l],
    ArrowDown: (r, l) => [r + 1, l],
    ArrowLeft: (r, l) => [r, l - 1],
    ArrowRight: (r, l) => [r, l + 1],
    PageUp: (r, l) => [r - 10, l],
    PageDown: (r, l) => [r + 10, l],
    Home: (r, l, all) => [all ? 0 : r, 0],
    End: (r, l, all) => [all ? Infinity : r, Infinity],
  };

  const placed = (event) => {
    const cell = event.target.closest("td");
    return cell && [cell.parentElement.sectionRowIndex, cell.cellIndex - 1];
  };

  sections.forEach((section) => {
    const table = section.querySelector("table");
    table.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step || event.altKey || event.metaKey) return;
      event.preventDefault();
      go(...step(...focus[shown], event.ctrlKey), true);
    });
    table.addEventListener("mouseover", (event) => {
      const place = placed(event);
      if (place) tell(...place);
    });
    table.addEventListener("mouseleave", () => tell(...focus[shown]));
    table.addEventListener("click", (event) => {
      const place = placed(event);
      if (place) go(...place, true);
    });
    table.addEventListener("focusin", (event) => {
      const place = placed(event);
      if (place) go(...place, false);
    });
  });

  const show = (number) => {
    shown = number;
    sections.forEach((section, i) => (section.hidden = i !== number));
    paint();
    tell(...focus[number]);
  };
  chooser?.addEventListener("change", () => show(Number(chooser.value)));
  metric.addEventListener("change", paint);
  details.hidden = false;
  show(0);
})();
