package v1_test

import (
	"fmt"
	"slices"
	"strings"
)

const (
	snowflake = `"123456789012345678"`
	validURL  = "wss://guilds.example.com"
)

// letters is a string of n letters.
func letters(n int) string { return strings.Repeat("a", n) }

// list is a YAML flow list of n entries, made of what a format does with 0 to n-1.
func list(n int, format string) string {
	entries := make([]string, n)
	for i := range entries {
		entries[i] = fmt.Sprintf(format, i)
	}
	return "[" + strings.Join(entries, ", ") + "]"
}

// entries is a YAML flow map of n entries with keys k0, k1 and so on.
func entries(n int) string {
	return "{" + strings.Trim(list(n, `k%d: v`), "[]") + "}"
}

// in puts a YAML value under a path: in("spec.relays", "{}") is {spec: {relays: {}}}.
func in(path, value string) string {
	for _, name := range slices.Backward(strings.Split(path, ".")) {
		value = "{" + name + ": " + value + "}"
	}
	return value
}

// each is in for several values.
func each(path string, values ...string) []string {
	texts := make([]string, len(values))
	for i, value := range values {
		texts[i] = in(path, value)
	}
	return texts
}

// bound is the case of a limit: at the limit is accepted, beyond it is refused.
func bound(rule, at, beyond, words string) ruleCase {
	fields := strings.Fields(rule)
	path := strings.TrimPrefix(fields[1], ".")
	return ruleCase{rule: rule, accepted: each(path, at), refused: each(path, beyond), words: words}
}

func minimum(path string, at int) ruleCase {
	return bound(path+" minimum", fmt.Sprint(at), fmt.Sprint(at-1), fmt.Sprintf("should be greater than or equal to %d", at))
}

func maximum(path string, at int) ruleCase {
	return bound(path+" maximum", fmt.Sprint(at), fmt.Sprint(at+1), fmt.Sprintf("should be less than or equal to %d", at))
}

func minLength(path string, at int) ruleCase {
	return bound(path+" minLength", letters(at), `"`+letters(at-1)+`"`, fmt.Sprintf("should be at least %d chars long", at))
}

func maxLength(path string, at int) ruleCase {
	return bound(path+" maxLength", letters(at), letters(at+1), fmt.Sprintf("may not be more than %d bytes", at))
}

func maxItems(path, format string, at int) ruleCase {
	return bound(path+" maxItems", list(at, format), list(at+1, format), fmt.Sprintf("must have at most %d items", at))
}

func maxProperties(path string, at int) ruleCase {
	return bound(path+" maxProperties", entries(at), entries(at+1), fmt.Sprintf("must have at most %d items", at))
}

func enum(path string, values ...string) ruleCase {
	at := strings.TrimPrefix(strings.Fields(path)[1], ".")
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = fmt.Sprintf("%q", v)
	}
	return ruleCase{
		rule:     path + " enum",
		accepted: each(at, values...),
		refused:  each(at, "Other", strings.ToLower(values[0]), `""`),
		words:    "supported values: " + strings.Join(quoted, ", "),
	}
}

// required is the case of a field that its struct asks for. full is the struct
// with the field, lacking the one without it.
func required(rule, path, full, lacking string) ruleCase {
	return ruleCase{rule: rule + " required", accepted: each(path, full), refused: each(path, lacking), words: "Required value"}
}

// notEmpty is the case of a struct that has only optional fields: without any it is left out.
func notEmpty(rule, full string) ruleCase {
	return bound(rule+" minProperties", full, "{}", "should have at least 1 properties")
}

var ruleCases = []ruleCase{
	// Guild, spec.
	bound("Guild .spec.id minLength", `"12345678901234567"`, `"1234567890123456"`, "should be at least 17 chars long"),
	bound("Guild .spec.id maxLength", `"1234567890123456789"`, `"12345678901234567890"`, "may not be more than 19 bytes"),
	{
		rule:     "Guild .spec.id validation: must be a snowflake: 17 to 19 decimal digits without a leading zero",
		accepted: each("spec.id", snowflake),
		refused:  each("spec.id", `"012345678901234567"`, `"12345678901234567x"`, `"-12345678901234567"`),
	},
	{
		rule:     "Guild .spec validation: id is immutable: set it when the Guild is created, or never",
		stored:   in("spec.id", snowflake),
		accepted: []string{`{spec: {id: ` + snowflake + `, displayName: other}}`},
		refused:  []string{in("spec.id", `"123456789012345679"`), `{spec: {}}`},
		field:    "spec.id",
	},
	minLength("Guild .spec.displayName", 1),
	maxLength("Guild .spec.displayName", 100),
	notEmpty("Guild .spec.access", "{join: Open}"),
	enum("Guild .spec.access.join", "Open", "MembersOnly"),
	enum("Guild .spec.deletionPolicy", "Retain", "Delete"),
	required("Guild .spec.bootstrap.channels", "spec.bootstrap", "{channels: [{name: a, type: Text}]}", "{}"),
	bound("Guild .spec.bootstrap.channels minItems", "[{name: a, type: Text}]", "[]", "should have at least 1 items"),
	maxItems("Guild .spec.bootstrap.channels", "{name: c%d, type: Text}", 500),
	required("Guild .spec.bootstrap.channels[].name", "spec.bootstrap.channels", "[{name: a, type: Text}]", "[{type: Text}]"),
	required("Guild .spec.bootstrap.channels[].type", "spec.bootstrap.channels", "[{name: a, type: Text}]", "[{name: a}]"),
	{
		rule:     "Guild .spec.bootstrap.channels[].name minLength",
		accepted: each("spec.bootstrap.channels", "[{name: a, type: Text}]"),
		refused:  each("spec.bootstrap.channels", `[{name: "", type: Text}]`),
		words:    "should be at least 1 chars long",
	},
	{
		rule:     "Guild .spec.bootstrap.channels[].name maxLength",
		accepted: each("spec.bootstrap.channels", "[{name: "+letters(100)+", type: Text}]"),
		refused:  each("spec.bootstrap.channels", "[{name: "+letters(101)+", type: Text}]"),
		words:    "may not be more than 100 bytes",
	},
	{
		rule:     "Guild .spec.bootstrap.channels[].type enum",
		accepted: each("spec.bootstrap.channels", "[{name: a, type: Text}]", "[{name: a, type: Voice}]", "[{name: a, type: Category}]"),
		refused:  each("spec.bootstrap.channels", "[{name: a, type: Stage}]", `[{name: a, type: ""}]`),
		words:    `supported values: "Text", "Voice", "Category"`,
	},
	{
		rule:     "Guild .spec validation: bootstrap is immutable: it is used once, at the birth of the guild's log",
		stored:   in("spec.bootstrap.channels", "[{name: a, type: Text}]"),
		accepted: []string{`{spec: {bootstrap: {channels: [{name: a, type: Text}]}, displayName: other}}`},
		refused:  append(each("spec.bootstrap.channels", "[{name: b, type: Text}]", "[{name: a, type: Text}, {name: b, type: Text}]"), `{spec: {}}`),
		field:    "spec.bootstrap",
	},
	notEmpty("Guild .spec.placement", "{shardName: a}"),
	minLength("Guild .spec.placement.shardName", 1),
	maxLength("Guild .spec.placement.shardName", 40),
	{
		rule: "Guild .spec.placement.shardName validation: must be the name of a GuildShard: " +
			"lower case letters, digits and '-', starting with a letter and ending with a letter or digit",
		accepted: each("spec.placement.shardName", "a", "a-1", "shard-0"),
		refused:  each("spec.placement.shardName", "A", "1a", "a-", "-a", "a.b", "a_b", `"a b"`),
	},
	{
		rule:     "Guild .spec.placement validation: shardName and shardSelector exclude each other: set one of them",
		accepted: each("spec.placement", "{shardName: a}", "{shardSelector: {matchLabels: {a: b}}}"),
		refused:  each("spec.placement", "{shardName: a, shardSelector: {matchLabels: {a: b}}}"),
	},
	notEmpty("Guild .spec.gateway", "{publicURL: \""+validURL+"\"}"),
	gatewayURL("Guild .spec.gateway.publicURL", "minLength"),
	gatewayURL("Guild .spec.gateway.publicURL", "maxLength"),
	gatewayURL("Guild .spec.gateway.publicURL", gatewayURLRule),
	enum("Guild .spec.relays.mode", "Auto", "Manual", "Disabled"),
	minimum("Guild .spec.relays.replicas", 0),
	maximum("Guild .spec.relays.replicas", 1000),
	minimum("Guild .spec.relays.minReplicas", 0),
	maximum("Guild .spec.relays.minReplicas", 1000),
	minimum("Guild .spec.relays.maxReplicas", 1),
	maximum("Guild .spec.relays.maxReplicas", 1000),
	minimum("Guild .spec.relays.sessionsPerRelay", 1),
	maximum("Guild .spec.relays.sessionsPerRelay", 15000),
	notEmpty("Guild .spec.relays.stabilizationSeconds", "{up: 5}"),
	minimum("Guild .spec.relays.stabilizationSeconds.up", 1),
	maximum("Guild .spec.relays.stabilizationSeconds.up", 3600),
	minimum("Guild .spec.relays.stabilizationSeconds.down", 1),
	maximum("Guild .spec.relays.stabilizationSeconds.down", 86400),
	notEmpty("Guild .spec.rebalance", "{mode: Disabled}"),
	enum("Guild .spec.rebalance.mode", "Auto", "Approve", "Disabled"),
	minimum("Guild .spec.rebalance.maxMovesPerSecond", 1),
	maximum("Guild .spec.rebalance.maxMovesPerSecond", 15000),
	minimum("Guild .spec.rebalance.maxSkewPercent", 1),
	maximum("Guild .spec.rebalance.maxSkewPercent", 1000),
	minimum("Guild .spec.rebalance.minSkewSessions", 1),
	maximum("Guild .spec.rebalance.minSkewSessions", 15000),
	{
		rule:     "Guild .spec.relays validation: minReplicas must not be above maxReplicas",
		accepted: each("spec.relays", "{minReplicas: 3, maxReplicas: 3}", "{minReplicas: 3}", "{maxReplicas: 3}"),
		refused:  each("spec.relays", "{minReplicas: 4, maxReplicas: 3}"),
		field:    "spec.relays.minReplicas",
	},

	// Guild, status.
	notEmpty("Guild .status", "{mode: Direct}"),
	maxItems("Guild .status.conditions", conditionFormat, 16),
	minimum("Guild .status.observedGeneration", 1),
	minLength("Guild .status.id", 17),
	maxLength("Guild .status.id", 19),
	enum("Guild .status.mode", "Direct", "Promoting", "Relayed", "Demoting"),
	required("Guild .status.placement.shardName", "status.placement", "{shardName: a, shardUID: b}", "{shardUID: b}"),
	required("Guild .status.placement.shardUID", "status.placement", "{shardName: a, shardUID: b}", "{shardName: a}"),
	inStruct("Guild .status.placement", "shardName", "minLength", "shardUID: b", "a", `""`, "at least 1 chars"),
	inStruct("Guild .status.placement", "shardName", "maxLength", "shardUID: b", letters(40), letters(41), "more than 40 bytes"),
	inStruct("Guild .status.placement", "shardUID", "minLength", "shardName: a", "b", `""`, "at least 1 chars"),
	inStruct("Guild .status.placement", "shardUID", "maxLength", "shardName: a", letters(64), letters(65), "more than 64 bytes"),
	inStruct("Guild .status.placement", "logID", "minLength", "shardName: a, shardUID: b", "c", `""`, "at least 1 chars"),
	inStruct("Guild .status.placement", "logID", "maxLength", "shardName: a, shardUID: b", letters(64), letters(65), "more than 64 bytes"),
	inStruct("Guild .status.placement", "epoch", "minimum", "shardName: a, shardUID: b", "1", "0", "greater than or equal to 1"),
	required("Guild .status.gateway.url", "status.gateway", "{url: a}", "{}"),
	minLength("Guild .status.gateway.url", 1),
	maxLength("Guild .status.gateway.url", 600),
	minimum("Guild .status.members", 0),
	minimum("Guild .status.online", 0),
	minimum("Guild .status.sessions", 0),
	required("Guild .status.relays.replicas", "status.relays", "{replicas: 0, selector: a}", "{selector: a}"),
	required("Guild .status.relays.selector", "status.relays", "{replicas: 0, selector: a}", "{replicas: 0}"),
	inStruct("Guild .status.relays", "replicas", "minimum", "selector: a", "0", "-1", "greater than or equal to 0"),
	inStruct("Guild .status.relays", "selector", "minLength", "replicas: 0", "a", `""`, "at least 1 chars"),
	inStruct("Guild .status.relays", "selector", "maxLength", "replicas: 0", letters(512), letters(513), "more than 512 bytes"),
	inStruct("Guild .status.relays", "desired", "minimum", "replicas: 0, selector: a", "0", "-1", "greater than or equal to 0"),
	inStruct("Guild .status.relays", "ready", "minimum", "replicas: 0, selector: a", "0", "-1", "greater than or equal to 0"),
	inStruct("Guild .status.relays", "updated", "minimum", "replicas: 0, selector: a", "0", "-1", "greater than or equal to 0"),
	inStruct("Guild .status.relays", "draining", "minimum", "replicas: 0, selector: a", "0", "-1", "greater than or equal to 0"),
	notEmpty("Guild .status.rebalance", "{round: 1}"),
	minimum("Guild .status.rebalance.round", 1),
	minimum("Guild .status.rebalance.toMove", 0),
	minimum("Guild .status.rebalance.moved", 0),
	minLength("Guild .status.rebalance.planHash", 1),
	maxLength("Guild .status.rebalance.planHash", 64),
	minLength("Guild .status.rebalance.summary", 1),
	maxLength("Guild .status.rebalance.summary", 512),
	minLength("Guild .status.rebalance.blockedReason", 1),
	maxLength("Guild .status.rebalance.blockedReason", 64),

	// GuildShard, name and spec.
	{
		rule: "GuildShard validation: metadata.name must be a DNS label of at most 40 characters that starts with a letter: " +
			"Services and the pod are named after it",
		accepted: each("metadata.name", "a", "shard-0", letters(40)),
		refused:  each("metadata.name", letters(41), "0a", "a.b"),
		field:    "metadata",
	},
	minLength("GuildShard .spec.image", 1),
	maxLength("GuildShard .spec.image", 512),
	minimum("GuildShard .spec.capacity.guilds", 1),
	maximum("GuildShard .spec.capacity.guilds", 10000),
	minimum("GuildShard .spec.capacity.sessions", 1),
	maximum("GuildShard .spec.capacity.sessions", 15000),
	enum("GuildShard .spec.availability", "Active", "Cordoned", "Draining"),
	required("GuildShard .spec.storage.size", "spec.storage", "{size: 1Gi}", "{whenDeleted: Retain}"),
	bound("GuildShard .spec.storage.size pattern", "1.5Gi", "1GB", "should match"),
	{
		rule:     "GuildShard .spec.storage.size validation: must be at least 64Mi, in digits with a suffix such as Mi or Gi",
		accepted: each("spec.storage.size", "64Mi", "67108864", "1Gi", "1.5G"),
		refused:  each("spec.storage.size", "63Mi", "67108863", "-1Gi", `"0"`, `"1e999999999"`),
	},
	{
		rule:     "GuildShard .spec validation: storage cannot be taken away: the logs of the shard's guilds are on it",
		stored:   in("spec.storage.size", "1Gi"),
		accepted: each("spec.storage.size", "1Gi"),
		refused:  []string{`{spec: {}}`, `{spec: {image: a}}`},
		field:    "spec.storage",
	},
	{
		rule:     "GuildShard .spec.storage validation: size can only grow",
		stored:   in("spec.storage.size", "1Gi"),
		accepted: each("spec.storage.size", "1Gi", "1024Mi", "1073741824", "2Gi"),
		refused:  each("spec.storage.size", "1G", "1023Mi", "1073741823"),
		field:    "spec.storage.size",
	},
	{
		rule:     "GuildShard .spec.storage validation: storageClassName is immutable: a volume cannot change its class",
		stored:   in("spec.storage", "{size: 1Gi, storageClassName: fast}"),
		accepted: each("spec.storage", "{size: 2Gi, storageClassName: fast}"),
		refused:  each("spec.storage", "{size: 1Gi, storageClassName: slow}", "{size: 1Gi}"),
		field:    "spec.storage.storageClassName",
	},
	inStruct("GuildShard .spec.storage", "storageClassName", "minLength", "size: 1Gi", "a", `""`, "at least 1 chars"),
	inStruct("GuildShard .spec.storage", "storageClassName", "maxLength", "size: 1Gi", letters(253), letters(254), "more than 253 bytes"),
	{
		rule:     "GuildShard .spec.storage.storageClassName validation: must be the name of a StorageClass: lower case letters, digits, '-' and '.'",
		accepted: each("spec.storage", "{size: 1Gi, storageClassName: fast.example.com}"),
		refused:  each("spec.storage", "{size: 1Gi, storageClassName: Fast}", "{size: 1Gi, storageClassName: fast/ssd}"),
	},
	{
		rule:     "GuildShard .spec.storage.whenDeleted enum",
		accepted: each("spec.storage", "{size: 1Gi, whenDeleted: Retain}", "{size: 1Gi, whenDeleted: Delete}"),
		refused:  each("spec.storage", "{size: 1Gi, whenDeleted: Recycle}"),
		words:    `supported values: "Retain", "Delete"`,
	},
	notEmpty("GuildShard .spec.retention", "{age: 1h}"),
	bound("GuildShard .spec.retention.bytes pattern", "1.5Gi", "1GB", "should match"),
	{
		rule:     "GuildShard .spec.retention.bytes validation: must be between 1Mi and 1Ti, in digits with a suffix such as Mi or Gi",
		accepted: each("spec.retention.bytes", "1Mi", "1048576", "1Ti"),
		refused:  each("spec.retention.bytes", "1023Ki", "1048575", "1025Gi", `"-1Mi"`, `"1e-999999999"`),
	},
	bound("GuildShard .spec.retention.age maxLength", "1h0m0.000000000000000000000000s", "1h0m0.00000000000000000000000000s", "may not be more than 32 bytes"),
	{
		rule:     "GuildShard .spec.retention.age validation: must be a duration between 1m and 720h, such as 90m",
		accepted: each("spec.retention.age", "1m", "60s", "1h30m", "720h"),
		refused:  each("spec.retention.age", "59s", "720h1s", "-1h", "soon", "1d", `"60"`, `""`),
	},
	notEmpty("GuildShard .spec.gateway", "{tlsSecretName: a}"),
	gatewayURL("GuildShard .spec.gateway.publicURL", "minLength"),
	gatewayURL("GuildShard .spec.gateway.publicURL", "maxLength"),
	gatewayURL("GuildShard .spec.gateway.publicURL", gatewayURLRule),
	gatewayURL("GuildShard .spec.gateway.frontDoorURL", "minLength"),
	gatewayURL("GuildShard .spec.gateway.frontDoorURL", "maxLength"),
	gatewayURL("GuildShard .spec.gateway.frontDoorURL", gatewayURLRule),
	minLength("GuildShard .spec.gateway.tlsSecretName", 1),
	maxLength("GuildShard .spec.gateway.tlsSecretName", 253),
	{
		rule:     "GuildShard .spec.gateway.tlsSecretName validation: must be the name of a Secret: lower case letters, digits, '-' and '.'",
		accepted: each("spec.gateway.tlsSecretName", "guilds.example.com"),
		refused:  each("spec.gateway.tlsSecretName", "Upper", "other/secret"),
	},
	notEmpty("GuildShard .spec.template", "{priorityClassName: a}"),
	notEmpty("GuildShard .spec.template.metadata", "{labels: {a: b}}"),
	maxProperties("GuildShard .spec.template.metadata.labels", 32),
	{
		rule:     "GuildShard .spec.template.metadata.labels validation: labels of guildhall.dev/ and app.kubernetes.io/ are set by the operator",
		accepted: each("spec.template.metadata.labels", "{team: a, example.com/team: a, guildhall.dev: a}"),
		refused:  each("spec.template.metadata.labels", "{guildhall.dev/shard: a}", "{app.kubernetes.io/name: a}"),
	},
	maxProperties("GuildShard .spec.template.metadata.annotations", 32),
	{
		rule:     "GuildShard .spec.template.metadata.annotations validation: annotations of guildhall.dev/ are set by the operator",
		accepted: each("spec.template.metadata.annotations", "{prometheus.io/scrape: 'true'}"),
		refused:  each("spec.template.metadata.annotations", "{guildhall.dev/template-hash: a}"),
	},
	maxProperties("GuildShard .spec.template.nodeSelector", 32),
	maxItems("GuildShard .spec.template.tolerations", "{key: k%d}", 32),
	maxItems("GuildShard .spec.template.topologySpreadConstraints", "{maxSkew: 1, topologyKey: k%d, whenUnsatisfiable: DoNotSchedule}", 16),
	minLength("GuildShard .spec.template.priorityClassName", 1),
	maxLength("GuildShard .spec.template.priorityClassName", 253),
	enum("GuildShard .spec.template.imagePullPolicy", "Always", "IfNotPresent", "Never"),
	maxItems("GuildShard .spec.template.imagePullSecrets", "{name: s%d}", 16),
	maxItems("GuildShard .spec.template.env", "{name: E%d}", 64),

	// GuildShard, status.
	notEmpty("GuildShard .status", "{guilds: 0}"),
	maxItems("GuildShard .status.conditions", conditionFormat, 16),
	minimum("GuildShard .status.observedGeneration", 1),
	minimum("GuildShard .status.guilds", 0),
	minimum("GuildShard .status.sessions", 0),
	minimum("GuildShard .status.capacityFree", 0),
	minLength("GuildShard .status.version", 1),
	maxLength("GuildShard .status.version", 128),
	minLength("GuildShard .status.bootID", 1),
	maxLength("GuildShard .status.bootID", 64),
	shardLoad("eventsPerSecond", "required"),
	shardLoad("eventsPerSecond", "minimum"),
	shardLoad("deliveriesPerSecond", "required"),
	shardLoad("deliveriesPerSecond", "minimum"),
	shardLoad("cpuMilli", "required"),
	shardLoad("cpuMilli", "minimum"),
	shardLoad("memoryBytes", "required"),
	shardLoad("memoryBytes", "minimum"),
	shardLoad("diskUsedBytes", "required"),
	shardLoad("diskUsedBytes", "minimum"),
}

const conditionFormat = `{type: T%d, status: "True", reason: R, message: "", lastTransitionTime: "2026-01-02T03:04:05Z"}`

// inStruct is bound for a field whose struct also needs other fields.
func inStruct(path, field, kind, others, at, beyond, words string) ruleCase {
	under := strings.TrimPrefix(strings.Fields(path)[1], ".")
	with := func(value string) []string {
		return each(under, "{"+others+", "+field+": "+value+"}")
	}
	return ruleCase{rule: path + "." + field + " " + kind, accepted: with(at), refused: with(beyond), words: words}
}

const gatewayURLRule = "validation: must be ws://host[:port][/path] or wss://host[:port][/path], without user, query or fragment"

// gatewayURL is the case of one rule of type GatewayURL, for a field of that type.
func gatewayURL(field, kind string) ruleCase {
	path := strings.TrimPrefix(strings.Fields(field)[1], ".")
	c := ruleCase{rule: field + " " + kind}
	quoted := func(urls ...string) []string {
		for i, url := range urls {
			urls[i] = `"` + url + `"`
		}
		return each(path, urls...)
	}
	long := func(n int) string { return validURL + "/" + letters(n-len(validURL)-1) }
	switch kind {
	case "minLength":
		c.accepted, c.refused, c.words = quoted(validURL), quoted(""), "should be at least 1 chars long"
	case "maxLength":
		c.accepted, c.refused, c.words = quoted(long(512)), quoted(long(513)), "may not be more than 512 bytes"
	default:
		c.accepted = quoted("ws://a", "wss://a:8443", "ws://10.0.0.1:80/base", "ws://[::1]:80/", "wss://guilds.example.com/a/b/")
		c.refused = quoted("https://a", "//a", "a", "ws://", "ws:///path", "ws://a?x=1", "ws://a?", "ws://a#x", "ws://a b", "ws://:80", "ws://user:secret@a")
	}
	return c
}

// shardLoad is the case of a field of status.load, which has all or none of its fields.
func shardLoad(field, kind string) ruleCase {
	with := func(value string) string {
		var parts []string
		for _, name := range []string{"eventsPerSecond", "deliveriesPerSecond", "cpuMilli", "memoryBytes", "diskUsedBytes"} {
			switch {
			case name != field:
				parts = append(parts, name+": 0")
			case value != "":
				parts = append(parts, name+": "+value)
			}
		}
		return "{" + strings.Join(parts, ", ") + "}"
	}
	c := ruleCase{rule: "GuildShard .status.load." + field + " " + kind, accepted: each("status.load", with("0"))}
	if kind == "required" {
		c.refused, c.words = each("status.load", with("")), "Required value"
	} else {
		c.refused, c.words = each("status.load", with("-1")), "should be greater than or equal to 0"
	}
	return c
}
