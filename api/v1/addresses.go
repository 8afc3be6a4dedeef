package v1

import "strings"

const (
	// MaxSessions is the most connections that one pod is planned to hold.
	MaxSessions = 15000

	// FrontDoorService is the Service that leads to every shard server of a namespace.
	FrontDoorService = "guildhall-gateway"
)

// RelayService is the Service that leads to the relays of the guild with that id and, while none of them takes
// connections, to its shard. It is there from the guild's first relay to the guild's end.
func RelayService(id string) string { return "relay-" + id }

// Addresses are the URLs of a guild, each ws(s)://host[:port][/path]/g/<id>/.
type Addresses struct {
	// Gateway is the lasting address, which outlives moves, and where sessions resume.
	Gateway string
	// Direct is where new connections go.
	Direct string
	// Relays is where sessions of relays resume.
	Relays string
}

// AddressesOf returns the URLs of the guild with that id. shard is the GuildShard that holds it.
func AddressesOf(g *Guild, id string, shard *GuildShard) Addresses {
	var own, direct, frontDoor GatewayURL
	if g.Spec.Gateway != nil {
		own = g.Spec.Gateway.PublicURL
	}
	if shard.Spec.Gateway != nil {
		direct, frontDoor = shard.Spec.Gateway.PublicURL, shard.Spec.Gateway.FrontDoorURL
	}
	inside := func(service string) GatewayURL { return GatewayURL("ws://" + service + "." + g.Namespace + ".svc") }
	return Addresses{
		Gateway: guildURL(id, own, frontDoor, inside(FrontDoorService)),
		Direct:  guildURL(id, own, direct, frontDoor, inside(shard.Name)),
		// Who comes in by the front door from outside the cluster does not reach a Service of its own.
		Relays: guildURL(id, own, frontDoor, inside(RelayService(id))),
	}
}

// guildURL is the guild's path under the first base that is set.
func guildURL(id string, bases ...GatewayURL) string {
	for _, base := range bases {
		if base != "" {
			return strings.TrimSuffix(string(base), "/") + "/g/" + id + "/"
		}
	}
	return ""
}
