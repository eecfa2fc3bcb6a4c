// Reads the vectors named on the command line and prints, for each stored value in order, what it holds or why it is
// refused. Written from docs/format.md, with Node's crypto alone; what must come out is not looked at.
import { createCipheriv, createDecipheriv, createHash, createHmac } from "node:crypto";
import { readFileSync } from "node:fs";

class Refused extends Error {}
function need(condition, error = "MalformedPayloadError") {
  if (!condition) throw new Refused(error);
  return condition;
}
function attempt(action, failure, error = "MalformedPayloadError") {
  try {
    return action();
  } catch (caught) {
    throw caught instanceof failure ? new Refused(error) : caught;
  }
}
const size = (bytes) => Buffer.from([24, 16, 8, 0].map((shift) => bytes.length >>> shift));
const lp = (...texts) => Buffer.concat(texts.map((text) => Buffer.from(text)).flatMap((bytes) => [size(bytes), bytes]));
const expand = (key, purpose) =>
  createHmac("sha256", key).update(lp("sqlalchemy-kravn-crypto/v1", purpose)).update(Buffer.from([1])).digest();
const hint = (name) => createHash("sha256").update(name).digest().subarray(0, 2);
function xaesSubkey(key, nonce) {
  const block = (input) => createCipheriv("aes-256-ecb", key, null).setAutoPadding(false).update(input);
  const l = block(Buffer.alloc(16));
  const k1 = Buffer.from(l.map((byte, at) => (byte << 1) | ((l[at + 1] ?? 0) >> 7)));
  if (l[0] & 0x80) k1[15] ^= 0x87;
  const messages = [1, 2].map((counter) => Buffer.from([0, counter, 0x58, 0, ...nonce.subarray(0, 12)]));
  return Buffer.concat(messages.map((message) => block(message.map((byte, at) => byte ^ k1[at]))));
}
const fromHex = (text) => Buffer.from(text, "hex");
function fromText(text) {
  const frame = Buffer.from(text.slice(7), "base64url");
  need(frame.length > 0 && `enc:v3:${frame.toString("base64url")}` === text, "MalformedCiphertextError");
  return frame;
}
function decrypt(frame, keys, names, row) {
  need(frame[0] === 0xf9, "MalformedCiphertextError");
  need(frame.length < 2 || frame[1] === 2, "UnsupportedAlgorithmError");
  need(frame.length >= 52, "MalformedCiphertextError");
  const isOurs = (key) => expand(key, "key-id").subarray(0, 8).equals(frame.subarray(2, 10));
  const key = need(keys.find(isOurs), "UnknownKeyError");
  const name = names.find((one) => hint(one).equals(frame.subarray(10, 12)));
  need(name !== undefined, "WrongColumnError");
  const nonce = frame.subarray(12, 36);
  const cipher = createDecipheriv("aes-256-gcm", xaesSubkey(expand(key, "aead/02"), nonce), nonce.subarray(12));
  const identity = row ? [lp(lp(...row))] : [];
  cipher.setAAD(Buffer.concat([frame.subarray(0, 12), lp(name), ...identity])).setAuthTag(frame.subarray(-16));
  const payload = cipher.update(frame.subarray(36, -16));
  attempt(() => cipher.final(), Error, "AuthenticationError");
  return payload;
}
const STRICT = { fatal: true, ignoreBOM: true };
const utf8 = (bytes) => attempt(() => new TextDecoder("utf-8", STRICT).decode(bytes), TypeError);
const among = (known, value) => (need(known.includes(value)), value);
const sized = (bytes, length) => (need(bytes.length === length), bytes);
const ascii = (bytes, pattern) => need(pattern.exec(bytes.toString("latin1")));
const signed = (bytes) => BigInt.asIntN(128, BigInt(`0x${sized(bytes, 16).toString("hex")}`));
const within = (number, least, most) => (need(number >= least && number <= most), number);
function unpad(bytes) {
  need(bytes.length > 0 && bytes.length % 48 === 0);
  const end = bytes.findLastIndex((byte) => byte !== 0);
  need(bytes[end] === 0x80 && bytes.length - end <= 48);
  return bytes.subarray(0, end);
}
function json(bytes) {
  // Called for each part with its text, the inner ones first; of several members of a name, for the last.
  const part = (name, value, { source }) => {
    need(name.isWellFormed() && (typeof value !== "string" || value.isWellFormed()));
    if (typeof value !== "number") return value;
    need(/^-?[0-9]+$/.test(source) || Number.isFinite(value));
    return JSON.rawJSON(source);
  };
  return attempt(() => JSON.stringify(JSON.parse(utf8(bytes), part)), SyntaxError);
}
function bigInteger(bytes) {
  const [text] = ascii(bytes, /^-?[1-9][0-9]*$/);
  const number = BigInt(text);
  need(BigInt.asIntN(128, number) !== number && number < 1n << 14000n && -number < 1n << 14000n);
  return text;
}
function decimal(padded) {
  const shape = /^-?(0|[1-9][0-9]*)(?:\.([0-9]+))?(?:E([+-][1-9][0-9]*))?$/;
  const [text, whole, fraction = "", given] = ascii(unpad(padded), shape);
  const exponent = BigInt(given ?? 0) - BigInt(fraction.length);
  const adjusted = exponent + BigInt((whole + fraction).replace(/^0+(?=.)/, "").length - 1);
  need(adjusted <= 999_999_999_999_999_999n && exponent >= -1_999_999_999_999_999_997n);
  const scientific = given !== undefined && whole.length === 1 && (whole !== "0" || fraction === "");
  need(exponent > 0n || adjusted < -6n ? scientific : given === undefined);
  return text;
}
const TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]";
function date(bytes, behind = "") {
  const [text, year, month, day] = ascii(bytes, new RegExp(`^([0-9]{4})-([0-9]{2})-([0-9]{2})${behind}$`));
  const leap = year % 4 === 0 && (year % 100 !== 0 || year % 400 === 0);
  const days = [31, leap ? 29 : 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month - 1];
  need(year > 0 && day > 0 && day <= days);
  return text;
}
function float(bytes) {
  const bits = sized(bytes, 8).readBigUInt64BE();
  const exponent = Number((bits >> 52n) & 0x7ffn);
  const fraction = (bits & 0xfffffffffffffn).toString(16).padStart(13, "0");
  need(exponent !== 0x7ff);
  const power = exponent ? exponent - 1023 : -1022;
  const zero = exponent === 0 && Number(`0x${fraction}`) === 0;
  const shown = zero ? "0.0p+0" : `${exponent ? 1 : 0}.${fraction}p${power < 0 ? "" : "+"}${power}`;
  return `${bits >> 63n ? "-" : ""}0x${shown}`;
}

const MEMBERS = ["red", "grün", "", "n".repeat(47), "n".repeat(48)];
const DAY = 86_400_000_000n;
const READERS = {
  json: { 0x01: json, 0x02: json },
  text: { 0x03: utf8 },
  bytes: { 0x04: (rest) => rest.toString("hex") },
  integer: { 0x10: signed, 0x11: bigInteger },
  decimal: { 0x92: decimal },
  boolean: { 0x13: (rest) => among([0, 1], sized(rest, 1)[0]) === 1 },
  date: { 0x14: date },
  time: { 0x15: (rest) => ascii(rest, new RegExp(`^${TIME}\\.[0-9]{6}$`))[0] },
  "naive datetime": { 0x16: (rest) => date(rest, `T${TIME}\\.[0-9]{6}`) },
  "aware datetime": { 0x17: (rest) => date(rest, `T${TIME}\\.[0-9]{6}(?!-00:00:00)[+-]${TIME}`) },
  uuid: { 0x18: (rest) => sized(rest, 16).toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-") },
  interval: { 0x19: (rest) => within(signed(rest), -999_999_999n * DAY, 1_000_000_000n * DAY - 1n) },
  enum: { 0x9a: (rest) => among(MEMBERS, utf8(unpad(rest))) },
  float: { 0x1b: float },
};

function open(entry, stored, frameOf) {
  try {
    const [keys, earlier] = [entry.keys ?? [entry.key], entry.earlier_names ?? []];
    const payload = decrypt(frameOf(stored), keys.map(fromHex), [entry.name, ...earlier], entry.row);
    const read = need(READERS[entry.type ?? "json"][payload[0]]);
    return { payload: payload.toString("hex"), value: String(read(payload.subarray(1))) };
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return { error: error.message };
  }
}

for (const path of process.argv.slice(2)) {
  const document = JSON.parse(readFileSync(path, "utf8"));
  for (const entry of document.cases ?? [...document.frames, ...document.must_fail]) {
    for (const field of ["stored", "frame", "text"].filter((name) => name in entry)) {
      console.log(JSON.stringify(open(entry, entry[field], field === "text" ? fromText : fromHex)));
    }
  }
}
