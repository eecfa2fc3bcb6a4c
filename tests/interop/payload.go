// The payload of a decrypted value: which kinds a column reads, and what they hold. See decrypt.go.
package main

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const clock = `(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d`

var members = []string{"red", "grün", "", strings.Repeat("n", 47), strings.Repeat("n", 48)}
var wellFormed = regexp.MustCompile(`"(?:[^"\\]|\\[^u]|\\u(?:[^dD]...|[dD][0-7]..|[dD][89abAB]..\\u[dD][c-fC-F]..))*"`)
var number = regexp.MustCompile(`-?\d[-+.\deE]*`)

func matched(text, pattern string) []string {
	found := regexp.MustCompile("^" + pattern + "$").FindStringSubmatch(text)
	need(found != nil)
	return found
}
func unpad(padded string) string {
	content := strings.TrimRight(padded, "\x00")
	need(len(padded)%48 == 0 && len(padded)-len(content) < 48 && strings.HasSuffix(content, "\x80"))
	return content[:len(content)-1]
}
func document(text string) string {
	bare := wellFormed.ReplaceAllString(text, "")
	need(utf8.ValidString(text) && json.Valid([]byte(text)) && !strings.Contains(bare, `"`))
	for _, found := range number.FindAllString(bare, -1) {
		_, err := strconv.ParseFloat(found, 64)
		need(err == nil || !strings.ContainsAny(found, ".eE"))
	}
	var value any
	var written strings.Builder
	decoder, encoder := json.NewDecoder(strings.NewReader(text)), json.NewEncoder(&written)
	decoder.UseNumber()
	encoder.SetEscapeHTML(false)
	need(decoder.Decode(&value) == nil && encoder.Encode(value) == nil)
	return strings.TrimSuffix(written.String(), "\n")
}
func signed(rest string) *big.Int {
	need(len(rest) == 16)
	low := new(big.Int).SetBytes([]byte(rest))
	return low.Sub(low, new(big.Int).Lsh(big.NewInt(int64(rest[0]>>7)), 128))
}
func bigInteger(text string) string {
	value, _ := new(big.Int).SetString(matched(text, `-?[1-9]\d*`)[0], 10)
	head := new(big.Int).Rsh(value, 127).String()
	need(head != "0" && head != "-1" && value.BitLen() <= 14_000)
	return text
}
func decimal(text string) string {
	found := matched(text, `-?(0|[1-9]\d*)(?:\.(\d+))?(?:E([+-][1-9]\d*))?`)
	whole, fraction, given := found[1], found[2], found[3]
	exponent, err := strconv.ParseInt(cmp.Or(given, "0"), 10, 64)
	exponent -= int64(len(fraction))
	adjusted := exponent + int64(max(1, len(strings.TrimLeft(whole+fraction, "0")))) - 1
	need(err == nil && adjusted <= 999_999_999_999_999_999 && exponent >= -1_999_999_999_999_999_997)
	need((given != "") == (exponent > 0 || adjusted < -6))
	need(given == "" || len(whole) == 1 && (whole != "0" || fraction == ""))
	return text
}
func date(text, behind string) string {
	_, err := time.Parse(time.DateOnly, matched(text, `(\d{4}-\d\d-\d\d)`+behind)[1])
	need(err == nil && text[:4] != "0000")
	return text
}
func float(rest string) string {
	need(len(rest) == 8)
	bits := binary.BigEndian.Uint64([]byte(rest))
	exponent, sign := int(bits>>52&0x7ff), strings.Repeat("-", int(bits>>63))
	need(exponent != 0x7ff)
	if bits<<1 == 0 {
		return sign + "0x0.0p+0"
	}
	return fmt.Sprintf("%s0x%d.%013xp%+d", sign, min(exponent, 1), bits&(1<<52-1), max(exponent, 1)-1023)
}
func value(kind, payload string) string {
	need(payload != "")
	rest := payload[1:]
	switch fmt.Sprintf("%s %02x", kind, payload[0]) {
	case "json 01", "json 02":
		return document(rest)
	case "text 03":
		need(utf8.ValidString(rest))
		return rest
	case "bytes 04":
		return hex.EncodeToString([]byte(rest))
	case "integer 10":
		return signed(rest).String()
	case "integer 11":
		return bigInteger(rest)
	case "decimal 92":
		return decimal(unpad(rest))
	case "boolean 13":
		need(rest == "\x00" || rest == "\x01")
		return strconv.FormatBool(rest == "\x01")
	case "date 14":
		return date(rest, "")
	case "time 15":
		return matched(rest, clock+`\.\d{6}`)[0]
	case "naive datetime 16":
		return date(rest, "T"+clock+`\.\d{6}`)
	case "aware datetime 17":
		need(!strings.HasSuffix(rest, "-00:00:00"))
		return date(rest, "T"+clock+`\.\d{6}[+-]`+clock)
	case "uuid 18":
		need(len(rest) == 16)
		return fmt.Sprintf("%x-%x-%x-%x-%x", rest[:4], rest[4:6], rest[6:8], rest[8:10], rest[10:])
	case "interval 19":
		days := new(big.Int).Div(signed(rest), big.NewInt(86_400_000_000))
		need(days.CmpAbs(big.NewInt(999_999_999)) <= 0)
		return signed(rest).String()
	case "enum 9a":
		need(slices.Contains(members, unpad(rest)))
		return unpad(rest)
	case "float 1b":
		return float(rest)
	}
	panic(refused("MalformedPayloadError"))
}
