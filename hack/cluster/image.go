package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// An image is one layer with static programs at the root.
type image struct {
	name       string
	entrypoint string
	user       string
	binaries   []string
}

// hostCertificates are the machine's trusted authorities, for programs that
// speak TLS to the world.
const hostCertificates = "/etc/ssl/certs/ca-certificates.crt"

func imageCommand(args []string) error {
	var img image
	var out string
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	flags.StringVar(&img.name, "name", "", "the image's `reference`, with its registry and tag")
	flags.StringVar(&out, "out", "", "the archive to write")
	flags.StringVar(&img.entrypoint, "entrypoint", "", "the program to start (default: the first binary)")
	flags.StringVar(&img.user, "user", "65532", "the user to run as, a `number`")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return exitCode(2)
	}
	img.binaries = flags.Args()
	if img.name == "" || out == "" || len(img.binaries) == 0 {
		return errors.New("image needs --name, --out and at least one binary")
	}
	if img.entrypoint == "" {
		img.entrypoint = "/" + filepath.Base(img.binaries[0])
	}
	return writeImage(out, img)
}

// writeImage writes a docker-archive. The same content gives the same bytes:
// all times are zero and the order is fixed.
func writeImage(path string, img image) error {
	layer, err := imageLayer(img)
	if err != nil {
		return err
	}
	layerDigest := digest(layer)
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"created":      time.Unix(0, 0).UTC(),
		"config": map[string]any{
			"Entrypoint": []string{img.entrypoint},
			"User":       img.user,
			"WorkingDir": "/",
			"Env":        []string{"PATH=/", "SSL_CERT_FILE=" + hostCertificates},
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + layerDigest}},
	})
	if err != nil {
		return err
	}
	configName, layerName := digest(config)+".json", layerDigest+".tar"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": configName, "RepoTags": []string{img.name}, "Layers": []string{layerName},
	}})
	if err != nil {
		return err
	}
	archive, err := writeTar([]tarEntry{
		{name: "manifest.json", mode: 0o644, content: manifest},
		{name: configName, mode: 0o644, content: config},
		{name: layerName, mode: 0o644, content: layer},
	})
	if err != nil {
		return err
	}
	return os.WriteFile(path, archive, 0o644)
}

func imageLayer(img image) ([]byte, error) {
	passwd := "root:x:0:0:root:/:/nologin\n"
	group := "root:x:0:\n"
	if img.user != "0" && img.user != "root" {
		passwd += fmt.Sprintf("nonroot:x:%[1]s:%[1]s:nonroot:/:/nologin\n", img.user)
		group += fmt.Sprintf("nonroot:x:%s:\n", img.user)
	}
	entries := []tarEntry{
		{name: "etc/", mode: 0o755},
		{name: "etc/group", mode: 0o644, content: []byte(group)},
		{name: "etc/passwd", mode: 0o644, content: []byte(passwd)},
	}
	if certificates, err := os.ReadFile(hostCertificates); err == nil {
		entries = append(entries,
			tarEntry{name: "etc/ssl/", mode: 0o755},
			tarEntry{name: "etc/ssl/certs/", mode: 0o755},
			tarEntry{name: strings.TrimPrefix(hostCertificates, "/"), mode: 0o644, content: certificates},
		)
	}
	entries = append(entries, tarEntry{name: "tmp/", mode: 0o1777})
	for _, path := range img.binaries {
		content, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if err := checkStatic(content); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		entries = append(entries, tarEntry{name: filepath.Base(path), mode: 0o755, content: content})
	}
	return writeTar(entries)
}

// checkStatic refuses a program that would look for a dynamic linker, which the
// image does not have. The container's error for it is "no such file".
func checkStatic(content []byte) error {
	program, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("not a program for Linux: %w", err)
	}
	for _, segment := range program.Progs {
		if segment.Type == elf.PT_INTERP {
			return errors.New("not a static program; build it with CGO_ENABLED=0")
		}
	}
	return nil
}

type tarEntry struct {
	name    string // a folder's ends with a slash
	mode    int64
	content []byte
}

func writeTar(entries []tarEntry) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		header := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.content)), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}
		if strings.HasSuffix(e.name, "/") {
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := io.Copy(w, bytes.NewReader(e.content)); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return out.Bytes(), err
}

func digest(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}
