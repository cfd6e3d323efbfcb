document.documentElement.classList.add("js");
for (const viewer of document.querySelectorAll(".viewer")) {
  const field = (name) => viewer.querySelector(`[name="${name}"]`);
  const wipe = field("wipe");
  const depth = field("slice");
  const outline = field("outline");
  const tops = viewer.querySelectorAll('[type="radio"]');
  const show = () => {
    viewer.style.setProperty("--wipe", wipe.value + "%");
    for (const plane of viewer.querySelectorAll(".plane")) {
      const slices = plane.querySelectorAll(".slice");
      const part = depth ? depth.value / depth.max : 0.5;
      const at = Math.round(part * (slices.length - 1));
      slices.forEach((slice, i) => slice.classList.toggle("on", i === at));
    }
    for (const top of tops) if (top.checked) viewer.dataset.top = top.value;
    if (outline) viewer.classList.toggle("plain", !outline.checked);
  };
  viewer.addEventListener("input", show);
  const drag = (event) => {
    const stack = event.target.closest(".slice");
    if (!stack || event.buttons !== 1) return;
    const box = stack.getBoundingClientRect();
    wipe.value = (100 * (event.clientX - box.left)) / box.width;
    show();
  };
  viewer.addEventListener("pointerdown", drag);
  viewer.addEventListener("pointermove", drag);
  show();
}
