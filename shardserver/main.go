// Command shardserver is Guildhall's data plane: it holds guilds, each an ordered log, and serves
// their sessions.
//
//	shardserver serve      runs a shard server, in Kubernetes or alone from a file
//	shardserver relay      runs one of a guild's relays
//	shardserver token      issues a user token
//	shardserver keygen     makes a key set
//	shardserver linkcerts  makes the certificates of links
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"guildhall.dev/guildhall/shardserver/linkcert"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

// version is set when a release is built.
var version = "dev"

const defaultKeysDir = "/etc/guildhall/keys"

const usage = `Usage: shardserver COMMAND [flags]

Commands:
  serve      run a shard server, in Kubernetes or, with --file, alone
  relay      run one of a guild's relays
  token      issue a user token
  keygen     make a key set in a directory
  linkcerts  make the certificates of a shard's and a guild's ends of links, for running them without Kubernetes
  version    print the version

Run "shardserver COMMAND -h" for the command's flags.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		os.Exit(2)
	default:
		explain(err)
		os.Exit(1)
	}
}

// terminationLog is where Kubernetes looks for what a container has to say in the end.
const terminationLog = "/dev/termination-log"

// explain says why the process ends.
func explain(err error) {
	fmt.Fprintln(os.Stderr, "shardserver:", err)
	if f, err2 := os.OpenFile(terminationLog, os.O_WRONLY|os.O_TRUNC, 0); err2 == nil {
		fmt.Fprintln(f, err)
		_ = f.Close()
	}
}

// errUsage: the command line was wrong, and that has been said.
var errUsage = errors.New("usage")

func run(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return errUsage
	}
	switch args[0] {
	case "serve":
		return serveCommand(ctx, args[1:])
	case "relay":
		return relayCommand(ctx, args[1:])
	case "linkcerts":
		return linkcertsCommand(args[1:])
	case "token":
		return tokenCommand(args[1:], out)
	case "keygen":
		return keygenCommand(args[1:])
	case "version":
		fmt.Fprintln(out, version)
		return nil
	case "help", "-h", "--help":
		fmt.Fprint(out, usage)
		return nil
	}
	fmt.Fprintf(os.Stderr, "shardserver: unknown command %q\n\n%s", args[0], usage)
	return errUsage
}

// parse reads flags; a wrong flag has been reported by the flag set.
func parse(fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage
	}
	if fs.NArg() > 0 {
		return fmt.Errorf("%s: unexpected argument %q", fs.Name(), fs.Arg(0))
	}
	return nil
}

func tokenCommand(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("shardserver token", flag.ContinueOnError)
	dir := fs.String("keys-dir", defaultKeysDir, "directory of the key set")
	user := fs.String("user", "", "user id, a snowflake; made anew when empty")
	name := fs.String("name", "user", "user name")
	bot := fs.Bool("bot", false, "the user is a bot")
	publish := fs.Bool("publish", false, "the bearer acts for the backend: publishes events, manages channels and members")
	lifetime := fs.Duration("lifetime", 0, "how long the token is good; for ever when 0")
	if err := parse(fs, args); err != nil {
		return err
	}
	keys, err := token.LoadKeys(*dir)
	if err != nil {
		return err
	}
	claims := token.Claims{Name: *name, Bot: *bot, Publish: *publish}
	if *user == "" {
		var source snowflake.Source
		claims.User = source.Next()
	} else if claims.User, err = snowflake.Parse(*user); err != nil {
		return fmt.Errorf("--user: %w", err)
	}
	if *lifetime < 0 {
		return fmt.Errorf("--lifetime: expected a positive duration, got %s", *lifetime)
	}
	if *lifetime > 0 {
		claims.Expires = time.Now().Add(*lifetime)
	}
	issued, err := keys.Issue(claims)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, issued)
	return nil
}

func keygenCommand(args []string) error {
	fs := flag.NewFlagSet("shardserver keygen", flag.ContinueOnError)
	dir := fs.String("keys-dir", defaultKeysDir, "directory of the key set; a key that is there is kept")
	if err := parse(fs, args); err != nil {
		return err
	}
	return makeKeys(*dir)
}

// makeKeys puts a key set into dir unless there is one.
func makeKeys(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".new-*") // nobody sees a key that is written in part
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) //nolint:errcheck // gone already when all went well
	_, err = fmt.Fprintln(f, token.GenerateKey())
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), filepath.Join(dir, token.CurrentKey)); !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// linkcertsCommand makes an authority, and DIR/shard and DIR/relay signed by it.
func linkcertsCommand(args []string) error {
	fs := flag.NewFlagSet("shardserver linkcerts", flag.ContinueOnError)
	dir := fs.String("dir", "", "directory in which shard/ and relay/ are made")
	namespace := fs.String("namespace", "default", "namespace of both ends")
	shard := fs.String("shard", "shard", "name of the GuildShard")
	guild := fs.String("guild", "", "id of the guild, a snowflake")
	if err := parse(fs, args); err != nil {
		return err
	}
	if *dir == "" {
		return errors.New("linkcerts: --dir: expected a directory")
	}
	if _, err := snowflake.Parse(*guild); err != nil {
		return fmt.Errorf("linkcerts: --guild: %w", err)
	}
	now := time.Now()
	pair, err := linkcert.NewAuthority(*namespace, now)
	if err != nil {
		return err
	}
	authority, err := linkcert.ParseAuthority(pair)
	if err != nil {
		return err
	}
	for end, id := range map[string]linkcert.Identity{
		"shard": {Namespace: *namespace, Shard: *shard}, "relay": {Namespace: *namespace, Guild: *guild},
	} {
		p, err := authority.Issue(id, now)
		if err != nil {
			return err
		}
		if err := linkcert.Write(filepath.Join(*dir, end), p, pair.Cert); err != nil {
			return err
		}
	}
	return nil
}
