// Numbers and elements. Names from files only ever become text: no string of theirs is parsed as HTML.

const MINUS = "\u2212", UNKNOWN = "\u2013", NO_BREAK = "\u00a0";
const known = (value) => value !== null && Number.isFinite(value);
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const counted = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
// for plotly, which reads a little HTML
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// three digits, as Python's .3g
function plain(value, digits = 3) {
  if (!known(value)) return UNKNOWN;
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-4 || size >= 1e6)
    ? value.toExponential(digits - 1)
    : String(Number(value.toPrecision(digits)));
  return text.replaceAll("-", MINUS);
}

// a value and the ends of its interval, with the digits that the interval supports: up to the first digit of its
// half-width, or to the second if the first is a one
function supported(value, low, high) {
  const width = known(low) && known(high) ? (high - low) / 2 : 0;
  if (!(width > 0) || !known(value)) return [plain(value), UNKNOWN, UNKNOWN];
  const magnitude = Math.floor(Math.log10(width));
  const decimals = (width < 2 * 10 ** magnitude ? 1 : 0) - magnitude;
  const step = 10 ** -decimals;
  return [value, low, high].map((each) => {
    if (decimals > 6) return each.toExponential(Math.max(0, decimals + Math.floor(Math.log10(Math.abs(each) || 1)))).replaceAll("-", MINUS);
    const rounded = decimals > 0 ? each.toFixed(decimals) : String(Math.round(each / step) * step);
    return Number(rounded) ? rounded.replace("-", MINUS) : rounded.replace("-", "");
  });
}

function pValue(value) {
  if (!known(value)) return UNKNOWN;
  return value < 1e-4 ? "< 0.0001" : value < 0.995 ? plain(value, 2) : "1";
}

// a range of numbers of trainings; null as its end is infinite
function counts(low, high) {
  const MOST = 100000;
  const rounded = (value, round) => {
    const step = 10 ** Math.max(Math.floor(Math.log10(Math.max(value, 1))) - 1, 0);
    return (round(value / step) * step).toLocaleString("en");
  };
  if (!known(low)) return UNKNOWN;
  if (low > MOST) return `more than ${MOST.toLocaleString("en")}`;
  if (!known(high) || high > MOST) return `at least ${rounded(low, Math.floor)}`;
  return low === high ? rounded(low, Math.ceil) : `${rounded(low, Math.floor)} to ${rounded(high, Math.ceil)}`;
}

async function unpacked(id) {
  const packed = document.getElementById(id).textContent;
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(packed);
  else { // browsers before 2025
    const text = atob(packed);
    bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at += 1) bytes[at] = text.charCodeAt(at);
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}
