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

// goBot is a bot of discordgo.
type goBot struct {
	*discordgo.Session
	socket cuttable
	ready  chan *discordgo.GuildCreate

	mu       sync.Mutex
	received []string
	resumed  int
}

func startGoBot(t *testing.T, url, token string) *goBot {
	t.Helper()
	pointDiscordgo(url)
	session, err := discordgo.New("Bot " + token)
	if err != nil {
		t.Fatal(err)
	}
	b := &goBot{Session: session, ready: make(chan *discordgo.GuildCreate, 8)}
	session.Dialer = &websocket.Dialer{NetDial: b.socket.dial}
	session.Identify.Intents = discordgo.IntentsGuilds | discordgo.IntentsGuildMessages | discordgo.IntentMessageContent
	session.SyncEvents = true
	session.AddHandler(func(_ *discordgo.Session, g *discordgo.GuildCreate) { b.ready <- g })
	session.AddHandler(func(_ *discordgo.Session, _ *discordgo.Resumed) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.resumed++
	})
	session.AddHandler(func(_ *discordgo.Session, m *discordgo.MessageCreate) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.received = append(b.received, m.Content)
	})
	if err := session.Open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	return b
}

func (b *goBot) messages() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.received)
}

func (b *goBot) resumes() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.resumed
}

func TestDiscordgo(t *testing.T) {
	namespace := makeNamespace(t)
	bot := startGoBot(t, guildOn(t, namespace, "shard-a"), tokens(t, namespace)("go", false))
	guild := <-bot.ready
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
		eventually(t, "discordgo: the messages", func() bool { return len(bot.messages()) >= len(want) })
		if received := bot.messages(); !slices.Equal(received, want) {
			t.Errorf("discordgo received %q, expected %q", received, want)
		}
	}
	send(series("first", 50))
	expect(series("first", 50))

	bot.socket.cut()
	send(series("missed", 50)) // some while it is away
	expect(append(series("first", 50), series("missed", 50)...))
	if resumed := bot.resumes(); resumed != 1 {
		t.Errorf("resumed %d times, expected once", resumed)
	}
}
