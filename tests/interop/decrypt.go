// Reads the vectors named on the command line and prints, for each stored value in order, what it holds or why it is
// refused. Written from docs/format.md, with Go's standard library alone; what must come out is not looked at.
package main

import (
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
)

type refused string
type entry struct {
	Key, Name, Type     string
	Keys                []string
	EarlierNames        []string  `json:"earlier_names"`
	Row                 *[]string // nil for a column that is not bound to its row
	Stored, Frame, Text *string
}

func need(condition bool, reason ...string) {
	if !condition {
		panic(refused(append(reason, "MalformedPayloadError")[0]))
	}
}
func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}
func fromHex(text string) []byte { return must(hex.DecodeString(text)) }
func lp(text string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...)
}
func expand(key []byte, purpose string) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write(slices.Concat(lp("sqlalchemy-kravn-crypto/v1"), lp(purpose), []byte{1}))
	return mac.Sum(nil)
}
func subkey(key, nonce []byte) []byte {
	block, k1, carry := must(aes.NewCipher(key)), make([]byte, 16), byte(0)
	block.Encrypt(k1, k1)
	for at := 15; at >= 0; at-- {
		k1[at], carry = k1[at]<<1|carry, k1[at]>>7
	}
	k1[15] ^= 0x87 * carry
	both := slices.Concat([]byte{0, 1, 0x58, 0}, nonce[:12], []byte{0, 2, 0x58, 0}, nonce[:12])
	for at := range both {
		both[at] ^= k1[at%16]
	}
	block.Encrypt(both[:16], both[:16])
	block.Encrypt(both[16:], both[16:])
	return both
}
func fromText(text string) []byte {
	encoded, found := strings.CutPrefix(text, "enc:v3:")
	frame, err := base64.RawURLEncoding.DecodeString(encoded)
	canonical := found && err == nil && base64.RawURLEncoding.EncodeToString(frame) == encoded
	need(canonical, "MalformedCiphertextError")
	return frame
}
func decrypt(frame []byte, keys, names []string, row *[]string) string {
	need(len(frame) > 0 && frame[0] == 0xf9, "MalformedCiphertextError")
	need(len(frame) < 2 || frame[1] == 2, "UnsupportedAlgorithmError")
	need(len(frame) >= 52, "MalformedCiphertextError")
	ours := func(key string) bool { return string(expand(fromHex(key), "key-id")[:8]) == string(frame[2:10]) }
	hinted := func(name string) bool {
		hash := sha256.Sum256([]byte(name))
		return string(hash[:2]) == string(frame[10:12])
	}
	which, written := slices.IndexFunc(keys, ours), slices.IndexFunc(names, hinted)
	need(which >= 0, "UnknownKeyError")
	need(written >= 0, "WrongColumnError")
	block := must(aes.NewCipher(subkey(expand(fromHex(keys[which]), "aead/02"), frame[12:36])))
	associated := slices.Concat(frame[:12], lp(names[written]))
	if row != nil {
		identity := ""
		for _, text := range *row {
			identity += string(lp(text))
		}
		associated = append(associated, lp(identity)...)
	}
	payload, err := must(cipher.NewGCM(block)).Open(nil, frame[24:36], frame[36:], associated)
	need(err == nil, "AuthenticationError")
	return string(payload)
}
func open(found entry, stored string, frameOf func(string) []byte) (result map[string]string) {
	defer func() {
		switch caught := recover().(type) {
		case nil:
		case refused:
			result = map[string]string{"error": string(caught)}
		default:
			panic(caught)
		}
	}()
	keys, names := found.Keys, append([]string{found.Name}, found.EarlierNames...)
	if found.Key != "" {
		keys = []string{found.Key}
	}
	payload := decrypt(frameOf(stored), keys, names, found.Row)
	read := value(cmp.Or(found.Type, "json"), payload)
	return map[string]string{"payload": hex.EncodeToString([]byte(payload)), "value": read}
}
func main() {
	for _, path := range os.Args[1:] {
		var found struct {
			Cases, Frames []entry
			MustFail      []entry `json:"must_fail"`
		}
		if err := json.Unmarshal(must(os.ReadFile(path)), &found); err != nil {
			panic(err)
		}
		for _, one := range slices.Concat(found.Cases, found.Frames, found.MustFail) {
			for place, stored := range []*string{one.Stored, one.Frame, one.Text} {
				if stored != nil {
					frameOf := []func(string) []byte{fromHex, fromHex, fromText}[place]
					fmt.Println(string(must(json.Marshal(open(one, *stored, frameOf)))))
				}
			}
		}
	}
}
