// A small picture of labels (side x side) that is painted by mouse, pen or finger; `data` holds it in base64.

function render({ model, el }) {
  const side = model.get("side"), colours = model.get("colours"), names = model.get("names");
  const map = new Uint8Array(side * side), before = []; // what "undo" goes back to
  let label = model.get("label"), last = null, soon = null;

  const canvas = document.createElement("canvas");
  canvas.className = "painter-canvas";
  canvas.width = canvas.height = side;
  const shown = `${model.get("shown")}px`;
  Object.assign(canvas.style, {
    width: shown, height: shown, imageRendering: "pixelated", touchAction: "none", cursor: "crosshair",
    border: "1px solid #999", backgroundSize: "100% 100%",
  });
  if (model.get("background")) canvas.style.backgroundImage = `url(${model.get("background")})`;
  const pen = canvas.getContext("2d"), shownNow = pen.createImageData(side, side);

  function show() {
    map.forEach((k, i) => shownNow.data.set(colours[k], 4 * i));
    pen.putImageData(shownNow, 0, 0);
  }
  function read() {
    map.set(Uint8Array.from(atob(model.get("data")), (c) => c.charCodeAt(0)));
    show();
  }
  function send() { // once the hand rests: a picture may be made of every message
    clearTimeout(soon);
    soon = setTimeout(() => {
      model.set("data", btoa(Array.from(map, (k) => String.fromCharCode(k)).join("")));
      model.save_changes();
    }, 400);
  }
  function keep() {
    before.push(map.slice());
    if (before.length > 50) before.shift();
  }

  function at(event) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((v) => v * side);
  }
  function dab(x, y) {
    const r = Number(width.value) / 2;
    for (let j = Math.max(0, Math.floor(y - r)); j < Math.min(side, y + r); j++)
      for (let i = Math.max(0, Math.floor(x - r)); i < Math.min(side, x + r); i++)
        if ((i + 0.5 - x) ** 2 + (j + 0.5 - y) ** 2 <= Math.max(r, 0.71) ** 2) map[j * side + i] = label;
  }
  function fill(x, y) {
    const start = Math.floor(y) * side + Math.floor(x), old = map[start], todo = [start];
    while (old !== label && todo.length) {
      const i = todo.pop(), column = i % side;
      if (map[i] !== old) continue;
      map[i] = label;
      if (column > 0) todo.push(i - 1);
      if (column < side - 1) todo.push(i + 1);
      if (i >= side) todo.push(i - side);
      if (i < side * (side - 1)) todo.push(i + side);
    }
  }
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    clearTimeout(soon);
    keep();
    last = at(event);
    (filling.checked ? fill : dab)(...last.map((v) => Math.min(Math.max(v, 0), side - 0.01)));
    show();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (last === null || filling.checked) return;
    const [x, y] = at(event), far = Math.hypot(x - last[0], y - last[1]), n = Math.ceil(2 * far) || 1;
    for (let k = 1; k <= n; k++) dab(last[0] + ((x - last[0]) * k) / n, last[1] + ((y - last[1]) * k) / n);
    last = [x, y];
    show();
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, () => {
      if (last !== null) send();
      last = null;
    });

  function button(text, act) {
    const one = document.createElement("button");
    Object.assign(one, { textContent: text, type: "button", onclick: () => act(one) });
    Object.assign(one.style, { margin: "2px", padding: "2px 8px", border: "2px solid transparent", cursor: "pointer" });
    return one;
  }
  const palette = document.createElement("div"), tools = document.createElement("div");
  palette.style.maxWidth = "300px";
  palette.append(...model.get("offered").map((k) => {
    const one = button(names[k], (pressed) => {
      label = k;
      for (const other of palette.children) other.setAttribute("aria-pressed", String(other === pressed));
      for (const other of palette.children) other.style.borderColor = other === pressed ? "#e36209" : "transparent";
    });
    const [r, g, b] = colours[k];
    one.className = "painter-label";
    Object.assign(one.style, { background: `rgb(${r},${g},${b})`, color: r + g + b > 380 ? "#000" : "#fff" });
    if (k === label) queueMicrotask(() => one.click());
    return one;
  }));
  const width = document.createElement("input"), filling = document.createElement("input");
  Object.assign(width, { type: "range", min: 1, max: Math.ceil(side / 3), value: model.get("brush"), title: "brush" });
  Object.assign(filling, { type: "checkbox", className: "painter-fill" });
  width.setAttribute("aria-label", "width of the brush");
  const undo = button("undo", () => {
    if (!before.length) return;
    map.set(before.pop());
    show();
    send();
  });
  undo.className = "painter-undo";
  const words = document.createElement("label");
  words.append(filling, " fill an area");
  tools.append("brush ", width, " ", words, " ", undo);
  el.append(canvas, palette, tools);
  model.on("change:data", read);
  read();
}

export default { render };
