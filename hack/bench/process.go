package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// process is a child. It ends with its context, with end, and with this process.
type process struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	exited chan struct{}
}

// startProcess starts a command. Its process group is its own, so that Ctrl-C reaches only this
// process, which ends things in order. The caller is locked to its thread, with which the child ends.
func startProcess(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if cmd.Stderr == nil {
		cmd.Stderr = os.Stderr
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, in: in, exited: make(chan struct{})}
	go func() {
		cmd.Process.Wait() //nolint:errcheck // it was killed, mostly
		close(p.exited)
	}()
	return p, nil
}

func (p *process) end() {
	p.cmd.Process.Kill() //nolint:errcheck // it may have ended
	<-p.exited
}

// server is a running server and where it is reached.
type server struct {
	*process
	address, publisher, admin string
	key, dir                  string
	guild                     int
}

func (s *server) end() {
	if s.process != nil {
		s.process.end()
	}
	os.RemoveAll(s.dir)
}

// startServer starts a system's server; Guildhall's has so many guilds.
func startServer(ctx context.Context, s *system, shardserver string, guilds int) (*server, error) {
	if s.serve == nil {
		return startGuildhall(ctx, shardserver, guilds)
	}
	cmd := exec.CommandContext(ctx, os.Args[0], "server", s.name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p, err := startProcess(cmd)
	if err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	addresses := strings.Fields(line)
	if err != nil || len(addresses) != 2 {
		p.end()
		return nil, fmt.Errorf("%s did not start: %q, %w", s.name, line, errors.Join(err, ctx.Err()))
	}
	return &server{process: p, address: addresses[0], publisher: addresses[1]}, nil
}

// clients is the running client process.
type clients struct {
	*process
	out       *bufio.Reader
	connected answer
}

// clientConfig is that of n sessions of the server's first guild.
func (s *server) clientConfig(system *system, n int) clientConfig {
	return clientConfig{
		System: system.name, Sessions: n, Address: s.address, Publisher: s.publisher, Key: s.key, Guild: s.guild, Guilds: 1,
		Payload: cmp.Or(system.payload, payloadSize),
	}
}

func (s *server) startClients(ctx context.Context, system *system, n int) (*clients, error) {
	return startClients(ctx, s.clientConfig(system, n))
}

// startClients connects the sessions.
func startClients(ctx context.Context, config clientConfig) (*clients, error) {
	cmd := exec.CommandContext(ctx, os.Args[0], "client")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p, err := startProcess(cmd)
	if err != nil {
		return nil, err
	}
	c := &clients{process: p, out: bufio.NewReader(out)}
	if c.connected, err = c.ask(config); err != nil {
		p.end()
		return nil, fmt.Errorf("connecting %d sessions: %w", config.Sessions, errors.Join(err, ctx.Err()))
	}
	return c, nil
}

// ask sends a line and waits for the answer.
func (c *clients) ask(question any) (answer, error) {
	b, err := json.Marshal(question)
	if err != nil {
		return answer{}, err
	}
	if _, err := c.in.Write(append(b, '\n')); err != nil {
		return answer{}, err
	}
	line, err := c.out.ReadBytes('\n')
	if err != nil {
		return answer{}, fmt.Errorf("the client process has ended: %w", err)
	}
	var a answer
	if err := json.Unmarshal(line, &a); err != nil {
		return answer{}, err
	}
	if a.Error != "" {
		return answer{}, errors.New(a.Error)
	}
	return a, nil
}

// cpu is the seconds, user and system, that the process has used: its clock of the scheduler
// (clock_getcpuclockid), which is what /proc/<pid>/stat has in steps of 10 ms.
func (p *process) cpu() (float64, error) {
	var t unix.Timespec
	err := unix.ClockGettime(int32(^p.cmd.Process.Pid)<<3|2, &t) //nolint:gosec // as the kernel has it
	return float64(t.Nano()) / 1e9, err
}

// rss is the process's resident memory in KB.
func (p *process) rss() (float64, error) {
	return procValue(fmt.Sprintf("/proc/%d/smaps_rollup", p.cmd.Process.Pid), "Rss:")
}

// writes is the number of write calls that the process has made, on whatever.
func (p *process) writes() (float64, error) {
	return procValue(fmt.Sprintf("/proc/%d/io", p.cmd.Process.Pid), "syscw:")
}

func procValue(file, name string) (float64, error) {
	b, err := os.ReadFile(file) //nolint:gosec // below /proc
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) >= 2 && fields[0] == name {
			return strconv.ParseFloat(fields[1], 64)
		}
	}
	return 0, fmt.Errorf("%s: expected %s", file, name)
}

// ticks per second of what the kernel tells in /proc/stat.
const ticks = 100

// machine is the seconds that all cores have spent since the start of the machine.
type machine struct{ busy, softirq float64 }

func readMachine() (m machine, err error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return m, err
	}
	line, _, _ := strings.Cut(string(b), "\n")
	for i, field := range strings.Fields(line)[1:] {
		v, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return m, err
		}
		switch i {
		case 3, 4, 8, 9: // idle, waiting for a disk; guests are in user time already
		default:
			m.busy += v / ticks
		}
		if i == 6 {
			m.softirq = v / ticks
		}
	}
	return m, nil
}
