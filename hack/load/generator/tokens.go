package generator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/token"
)

// tokenSource makes the token of a user.
type tokenSource func(ctx context.Context, user uint64, name string, publish bool) (string, error)

// Tokens say where tokens come from; at most one is to be set, and without any it is the environment.
type Tokens struct {
	Token      string
	File       string // with tokens, one a line
	Command    string // for the shell; prints a token
	KeysDir    string // directory of a key set
	KeysSecret string // NAMESPACE/NAME of a Secret with a key set
	Kubeconfig string
}

func (t *Tokens) source(ctx context.Context) (tokenSource, error) {
	set := 0
	for _, s := range []string{t.Token, t.File, t.Command, t.KeysDir, t.KeysSecret} {
		if s != "" {
			set++
		}
	}
	if set == 0 {
		t.Token = os.Getenv("GUILDHALL_TOKEN")
	}
	if set > 1 || set == 0 && t.Token == "" {
		return nil, errors.New("give one of --token, --token-file, --token-command, --keys-dir, --keys-secret")
	}
	switch {
	case t.Token != "":
		return listed([]string{t.Token}), nil
	case t.File != "":
		b, err := os.ReadFile(t.File)
		if err != nil {
			return nil, err
		}
		tokens := strings.Fields(string(b))
		if len(tokens) == 0 {
			return nil, fmt.Errorf("%s has no token", t.File)
		}
		return listed(tokens), nil
	case t.Command != "":
		return func(ctx context.Context, user uint64, name string, publish bool) (string, error) {
			return fromCommand(ctx, t.Command, user, name, publish)
		}, nil
	case t.KeysDir != "":
		keys, err := token.LoadKeys(t.KeysDir)
		if err != nil {
			return nil, err
		}
		return issued(keys), nil
	default:
		keys, err := keysFromSecret(ctx, t.Kubeconfig, t.KeysSecret)
		if err != nil {
			return nil, err
		}
		return issued(keys), nil
	}
}

// listed gives the tokens one after the other, and around again. A publisher gets the first.
func listed(tokens []string) tokenSource {
	next := 0
	return func(_ context.Context, _ uint64, _ string, publish bool) (string, error) {
		if publish {
			return tokens[0], nil
		}
		t := tokens[next%len(tokens)]
		next++
		return t, nil
	}
}

func issued(keys *token.Keys) tokenSource {
	return func(_ context.Context, user uint64, name string, publish bool) (string, error) {
		return keys.Issue(token.Claims{User: snowflake.ID(user), Name: name, Bot: publish, Publish: publish})
	}
}

// fromCommand runs a shell command that prints a token. It finds the user in its environment.
func fromCommand(ctx context.Context, command string, user uint64, name string, publish bool) (string, error) {
	cmd := exec.CommandContext(ctx, "sh", "-c", command) //nolint:gosec // the caller's own command
	cmd.Env = append(os.Environ(), fmt.Sprintf("LOAD_USER=%d", user), "LOAD_NAME="+name, fmt.Sprintf("LOAD_PUBLISH=%v", publish))
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("token command: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	t := strings.TrimSpace(out.String())
	if t == "" || strings.ContainsAny(t, " \n") {
		return "", errors.New("token command: expected one token as its output")
	}
	return t, nil
}

// keysFromSecret reads a key set from a Secret, named NAMESPACE/NAME.
func keysFromSecret(ctx context.Context, kubeconfig, secret string) (*token.Keys, error) {
	namespace, name, ok := strings.Cut(secret, "/")
	if !ok || namespace == "" || name == "" {
		return nil, errors.New("--keys-secret: expected NAMESPACE/NAME")
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	s, err := client.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return token.ParseKeys(string(s.Data[token.CurrentKey]), string(s.Data[token.PreviousKey]))
}
