package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// system is one of those compared.
type system struct {
	name string
	// flatOutOnly: at a low rate it would wait for more events, or does the same as another one.
	flatOutOnly bool
	// serve is the server, of a process of its own; nil for Guildhall, which has its own binary.
	serve func(*endpoints) error
	// dialect is how a session begins.
	dialect dialect
	// payload is the bytes of an event; payloadSize when 0.
	payload int
}

// dialect is what a client sends after the upgrade, one message after another: each when a
// message that has await in it came.
type dialect struct {
	path  string
	steps []step
	// resume is what it sends when it comes back; nil: steps, and events meanwhile are lost.
	resume []step
	// heartbeat is sent by each session now and then; none when empty.
	heartbeat string
}

type step struct {
	await string
	send  func(*client, int) string // nil: nothing, await was the last
}

const floorName = "floor"

var systems = []system{
	{name: floorName, serve: serveFloor(1), dialect: dialect{path: "/"}},
	{name: "floor-8", serve: serveFloor(8), dialect: dialect{path: "/"}, flatOutOnly: true},
	{name: "floor-16", serve: serveFloor(16), dialect: dialect{path: "/"}, flatOutOnly: true},
	{name: "gorilla-hub", serve: serveHub, dialect: dialect{path: "/"}},
	{name: "centrifuge", serve: serveCentrifuge(0), dialect: centrifugeDialect},
	{name: "centrifuge-delay", serve: serveCentrifuge(200 * time.Millisecond), dialect: centrifugeDialect, flatOutOnly: true},
	{name: "gws", serve: serveGWS, dialect: dialect{path: "/"}},
	{name: guildhallName, dialect: guildhallDialect},
}

// upgradeOnly is what storms are compared with: a session that does nothing but connect.
var upgradeOnly = system{name: "gorilla-upgrade", serve: serveUpgrades, dialect: dialect{path: "/"}}

// systemNamed finds a system. A floor may have any number of frames in a write: floor-7.25.
func systemNamed(name string) (*system, error) {
	for i := range systems {
		if systems[i].name == name {
			return &systems[i], nil
		}
	}
	if name == upgradeOnly.name {
		return &upgradeOnly, nil
	}
	if frames, ok := strings.CutPrefix(name, "floor-"); ok {
		if k, err := strconv.ParseFloat(frames, 64); err == nil && k >= 1 && k <= window {
			return &system{name: name, serve: serveFloor(k), dialect: dialect{path: "/"}, flatOutOnly: true}, nil
		}
	}
	return nil, fmt.Errorf("no system %q", name)
}

// endpoints are where a server is reached: by sessions, and by the publisher, who has one
// connection and sends each event behind its length, 4 bytes; length 0 says that no more comes.
type endpoints struct {
	sessions, publisher net.Listener
}

func serverCommand(name string) error {
	s, err := systemNamed(name)
	if err != nil {
		return err
	}
	if s.serve == nil {
		return fmt.Errorf("%s has a binary of its own", name)
	}
	e := &endpoints{}
	if e.sessions, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
		return err
	}
	if e.publisher, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
		return err
	}
	go func() { // the parent is gone, or done
		io.Copy(io.Discard, os.Stdin) //nolint:errcheck // every outcome ends it
		os.Exit(0)
	}()
	fmt.Println(e.sessions.Addr(), e.publisher.Addr())
	return s.serve(e)
}

// listen serves WebSocket upgrades.
func (e *endpoints) listen(h http.Handler) {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		fmt.Fprintln(os.Stderr, server.Serve(e.sessions))
		os.Exit(1)
	}()
}

// published calls publish with every event of the publisher; nil says that no more comes for now.
func (e *endpoints) published(publish func(payload []byte)) error {
	conn, err := e.publisher.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	r := bufio.NewReaderSize(conn, 64<<10)
	for {
		var header [4]byte
		if _, err := io.ReadFull(r, header[:]); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		n := binary.BigEndian.Uint32(header[:])
		switch {
		case n > 1<<20:
			return errors.New("event too large")
		case n == 0:
			publish(nil)
			continue
		}
		payload := make([]byte, n)
		if _, err := io.ReadFull(r, payload); err != nil {
			return err
		}
		publish(payload)
	}
}
