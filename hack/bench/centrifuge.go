package main

import (
	"context"
	"time"

	"github.com/centrifugal/centrifuge"
)

// centrifugeDialect: the session is subscribed by the server as it connects.
var centrifugeDialect = dialect{path: "/", steps: []step{
	{send: func(*client, int) string { return `{"id":1,"connect":{}}` }},
	{await: `"connect"`},
}}

const centrifugeChannel = "bench"

// serveCentrifuge is a node of centrifuge with its memory broker and one channel, JSON. With a
// delay it collects what there is for a session and writes it at once, from timers.
func serveCentrifuge(delay time.Duration) func(*endpoints) error {
	return func(e *endpoints) error {
		node, err := centrifuge.New(centrifuge.Config{})
		if err != nil {
			return err
		}
		node.OnConnecting(func(context.Context, centrifuge.ConnectEvent) (centrifuge.ConnectReply, error) {
			return centrifuge.ConnectReply{
				Credentials:        &centrifuge.Credentials{UserID: "bench"},
				Subscriptions:      map[string]centrifuge.SubscribeOptions{centrifugeChannel: {}},
				WriteDelay:         delay,
				WriteWithTimer:     delay > 0,
				MaxMessagesInFrame: -1,
			}, nil
		})
		if err := node.Run(); err != nil {
			return err
		}
		e.listen(centrifuge.NewWebsocketHandler(node, centrifuge.WebsocketConfig{
			ReadBufferSize: 512, UseWriteBufferPool: true, ProcessCommandsOffReadLoop: true,
			// No run is long enough to need pings.
			PingPongConfig: centrifuge.PingPongConfig{PingInterval: -1, PongTimeout: -1},
		}))
		return e.published(func(payload []byte) {
			if payload == nil {
				return
			}
			if _, err := node.Publish(centrifugeChannel, payload); err != nil {
				panic(err)
			}
		})
	}
}
