package e2e

import (
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/bwmarrin/discordgo"
	"github.com/gorilla/websocket"
)

// pointDiscordgo points the library at a guild: its endpoints are variables of the package.
func pointDiscordgo(url string) {
	api := restBase(url) + "/v" + discordgo.APIVersion + "/"
	discordgo.EndpointAPI = api
	discordgo.EndpointGuilds = api + "guilds/"
	discordgo.EndpointChannels = api + "channels/"
	discordgo.EndpointUsers = api + "users/"
	discordgo.EndpointGateway = api + "gateway"
	discordgo.EndpointGatewayBot = api + "gateway/bot"
}

// cuttable remembers the connection that a dialer made last.
type cuttable struct {
	mu   sync.Mutex
	conn net.Conn
}

func (c *cuttable) dial(network, address string) (net.Conn, error) {
	conn, err := net.Dial(network, address)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = conn
	return conn, err
}

func (c *cuttable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.conn.(*net.TCPConn).SetLinger(0) // a reset, not an orderly end
	c.conn.Close()
}

func TestDiscordgo(t *testing.T) {
	namespace := makeNamespace(t)
	url := guildOn(t, namespace, "shard-a")
	issue := tokens(t, namespace)
	pointDiscordgo(url)

	bot, err := discordgo.New("Bot " + issue("go", false))
	if err != nil {
		t.Fatal(err)
	}
	var socket cuttable
	bot.Dialer = &websocket.Dialer{NetDial: socket.dial}
	bot.Identify.Intents = discordgo.IntentsGuilds | discordgo.IntentsGuildMessages | discordgo.IntentMessageContent
	bot.SyncEvents = true

	var mu sync.Mutex
	var received []string
	resumed := 0
	ready := make(chan *discordgo.GuildCreate, 8)
	bot.AddHandler(func(_ *discordgo.Session, g *discordgo.GuildCreate) { ready <- g })
	bot.AddHandler(func(_ *discordgo.Session, _ *discordgo.Resumed) {
		mu.Lock()
		defer mu.Unlock()
		resumed++
	})
	bot.AddHandler(func(_ *discordgo.Session, m *discordgo.MessageCreate) {
		mu.Lock()
		defer mu.Unlock()
		received = append(received, m.Content)
	})
	if err := bot.Open(); err != nil {
		t.Fatal(err)
	}
	defer bot.Close()

	guild := <-ready
	var names []string
	var general string
	for _, c := range guild.Channels {
		names = append(names, c.Name)
		if c.Name == "general" {
			general = c.ID
		}
	}
	if guild.Name != "Lobby" || !slices.Equal(names, []string{"general", "Lounge"}) {
		t.Fatalf("guild %q with channels %q", guild.Name, names)
	}
	send := func(contents []string) {
		t.Helper()
		for _, content := range contents {
			if _, err := bot.ChannelMessageSend(general, content); err != nil {
				t.Fatal(err)
			}
		}
	}
	expect := func(want []string) {
		t.Helper()
		eventually(t, "discordgo: the messages", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(received) >= len(want)
		})
		mu.Lock()
		defer mu.Unlock()
		if !slices.Equal(received, want) {
			t.Errorf("discordgo received %q, expected %q", received, want)
		}
	}
	send(series("first", 50))
	expect(series("first", 50))

	socket.cut()
	send(series("missed", 50)) // some while it is away
	expect(append(series("first", 50), series("missed", 50)...))
	mu.Lock()
	defer mu.Unlock()
	if resumed != 1 {
		t.Errorf("resumed %d times, expected once", resumed)
	}
}
