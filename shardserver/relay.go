package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/linkcert"
	"guildhall.dev/guildhall/shardserver/relay"
	"guildhall.dev/guildhall/shardserver/snowflake"
)

// relayConfig is what a relay has besides what every shard server has.
type relayConfig struct {
	guild        snowflake.ID
	guildUID     string
	name         string
	shardAddress string
	restAddress  string
	gatewayURL   string
	sessions     int
	drain        time.Duration
}

func relayCommand(ctx context.Context, args []string) error {
	c := config{relay: &relayConfig{}}
	r := c.relay
	fs := flag.NewFlagSet("shardserver relay", flag.ContinueOnError)
	id := fs.String("guild-id", "", "id of the guild, a snowflake")
	fs.StringVar(&r.guildUID, "guild-uid", "", "uid of the Guild")
	fs.StringVar(&r.name, "name", "", "name of this relay among the guild's: its pod's")
	fs.StringVar(&c.namespace, "namespace", "", "namespace of the Guild")
	fs.StringVar(&r.shardAddress, "shard-address", "", "host and port of the shard's links")
	fs.StringVar(&r.restAddress, "shard-rest-address", "", "host and port where the shard answers REST; port 8080 of --shard-address when empty")
	fs.StringVar(&c.linkDir, "link-dir", "", "directory with tls.crt, tls.key and ca.crt of the link, re-read when they change")
	fs.StringVar(&r.gatewayURL, "gateway-url", "", "address where clients resume, ws(s)://host[:port][/path]/g/<guild id>/")
	fs.IntVar(&r.sessions, "sessions", v1.MaxSessions, "connections that the relay is planned to hold")
	fs.DurationVar(&r.drain, "drain", 20*time.Second, "how long sessions have to leave when the relay ends")
	fs.StringVar(&c.listen, "listen", ":8080", "address of the gateway")
	fs.StringVar(&c.listenTLS, "listen-tls", ":8443", "address of the same over TLS, with --tls-dir")
	fs.StringVar(&c.adminListen, "admin-listen", ":9090", "address of health and metrics")
	fs.StringVar(&c.keysDir, "keys-dir", defaultKeysDir, "directory of the key set")
	fs.StringVar(&c.tlsDir, "tls-dir", "", "directory with tls.crt and tls.key, re-read when they change")
	if err := parse(fs, args); err != nil {
		return err
	}
	c.logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	var err error
	if r.guild, err = snowflake.Parse(*id); err != nil {
		return fmt.Errorf("relay: --guild-id: %w", err)
	}
	host, _, err := net.SplitHostPort(r.shardAddress)
	switch {
	case err != nil:
		return fmt.Errorf("relay: --shard-address: expected host:port, got %q", r.shardAddress)
	case r.name == "":
		return errors.New("relay: --name: expected a name")
	case r.gatewayURL == "":
		return errors.New("relay: --gateway-url: expected ws(s)://host[:port][/path]/g/<guild id>/")
	case r.sessions < 1 || r.sessions > v1.MaxSessions:
		return fmt.Errorf("relay: --sessions: expected 1 to %d, got %d", v1.MaxSessions, r.sessions)
	}
	if r.restAddress == "" {
		r.restAddress = net.JoinHostPort(host, "8080")
	}
	return serve(ctx, c)
}

// makeRelay makes the server one of a guild's relays.
func (s *server) makeRelay() error {
	c := s.config.relay
	files, err := linkcert.Load(s.linkDir)
	if err != nil {
		return fmt.Errorf("--link-dir: %w", err)
	}
	if own := files.Identity(); own.Guild != c.guild.String() {
		return fmt.Errorf("--link-dir: the certificate is of %s, expected one of the relays of guild %s", own, c.guild)
	}
	var boot [8]byte
	rand.Read(boot[:])
	s.relay = relay.New(relay.Options{
		Guild: c.guild, GuildUID: c.guildUID, Name: c.name, ShardLinks: c.shardAddress, ShardClients: c.restAddress,
		GatewayURL: c.gatewayURL, Sessions: c.sessions, TLS: files.Client(), Core: s.core, Version: version,
		BootID: hex.EncodeToString(boot[:]), Load: s.load, Logger: s.logger,
	})
	return nil
}
