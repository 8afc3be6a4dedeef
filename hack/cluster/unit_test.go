package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestKubernetesVersionIsThatOfTheModule(t *testing.T) {
	content, err := os.ReadFile("modules/kubernetes/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(content), "require k8s.io/kubernetes "+kubernetesVersion+"\n") &&
		!strings.Contains(string(content), "\tk8s.io/kubernetes "+kubernetesVersion+" ") {
		t.Errorf("modules/kubernetes/go.mod does not require k8s.io/kubernetes %s", kubernetesVersion)
	}
	// The staging modules carry the same release under major version 0.
	staging := strings.Replace(kubernetesVersion, "v1.", "v0.", 1)
	for line := range strings.Lines(string(content)) {
		if from, to, ok := strings.Cut(line, " => "); ok && strings.TrimSpace(to) != strings.TrimSpace(from)+" "+staging {
			t.Errorf("not %s: %s", staging, line)
		}
	}
}

func TestLinkerFlags(t *testing.T) {
	for _, want := range []string{"-s -w", "version.gitVersion=" + kubernetesVersion + " ", "version.gitMajor=1 ", "version.gitMinor=37 "} {
		if !strings.Contains(linkerFlags(), want) {
			t.Errorf("%q is not in %q", want, linkerFlags())
		}
	}
}

func TestCacheKeysAreSeparate(t *testing.T) {
	dir := t.TempDir()
	for _, module := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(dir, module), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	key := func(module string) string {
		key, err := cacheKey(dir, []binary{{name: "x", dir: module, pkg: "."}})
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	a, b := key("a"), key("b")
	for _, file := range []string{"a/go.mod", "a/main.go"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(file), 0o644); err != nil {
			t.Fatal(err)
		}
		if now := key("a"); now == a {
			t.Errorf("%s does not count", file)
		} else {
			a = now
		}
	}
	if key("b") != b {
		t.Error("a change in one module is a change of another")
	}
}

func TestBuildOnlyWhatIsMissing(t *testing.T) {
	c := cache{source: ".", dir: t.TempDir(), binaries: []binary{{name: "pause", dir: ".", pkg: "./pause"}}}
	var progress bytes.Buffer
	var callers sync.WaitGroup
	for range 2 {
		callers.Go(func() {
			if err := c.build(t.Context(), io.Discard); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if err := c.build(t.Context(), &progress); err != nil || progress.Len() > 0 {
		t.Errorf("the second build: %v, %q", err, progress.String())
	}
	entries, err := os.ReadDir(c.bin())
	if err != nil || len(entries) != 1 {
		t.Errorf("in the cache are %v, %v", entries, err)
	}
}

func TestRunFolder(t *testing.T) {
	foreign := layout{dir: t.TempDir()}
	if err := os.WriteFile(foreign.path("thesis.txt"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := foreign.create(); err == nil {
		t.Error("a folder with foreign files was taken for a run folder")
	}
	if err := removeRunFolder(foreign); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(foreign.path("thesis.txt")); err != nil {
		t.Error("a foreign file was removed:", err)
	}
	if err := (layout{dir: "/" + strings.Repeat("x", 100)}).create(); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("a long path: %v", err)
	}
	own := layout{dir: filepath.Join(t.TempDir(), "run")}
	for range 2 {
		if err := own.create(); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeRunFolder(own); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(own.dir); err == nil {
		t.Error("the run folder is still there")
	}
}

func TestPKI(t *testing.T) {
	l := layout{dir: t.TempDir()}
	if err := os.Mkdir(l.path("pki"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writePKI(l); err != nil {
		t.Fatal(err)
	}
	config, err := supervisorTLS(l)
	if err != nil {
		t.Fatal(err)
	}
	client, err := x509.ParseCertificate(config.Certificates[0].Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Verify(x509.VerifyOptions{Roots: config.RootCAs, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if !slices.Equal(client.Subject.Organization, []string{"system:masters"}) {
		t.Errorf("the supervisor's groups are %v", client.Subject.Organization)
	}
	secrets, err := filepath.Glob(l.path("pki", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range append(secrets, l.kubeconfig()) {
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", file, info.Mode(), err)
		}
	}

	ca, err := newAuthority("a")
	if err != nil {
		t.Fatal(err)
	}
	server, err := ca.leaf("server", nil, "example", "10.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]bool{"example": true, "10.0.0.1": true, "other": false} {
		if err := server.cert.VerifyHostname(host); (err == nil) != want {
			t.Errorf("%s: %v", host, err)
		}
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	if _, err := client.Verify(x509.VerifyOptions{Roots: roots}); err == nil {
		t.Error("one authority's client passes for another's")
	}
}

func TestImage(t *testing.T) {
	program := filepath.Join(t.TempDir(), "pause")
	c := cache{source: ".", dir: t.TempDir(), binaries: []binary{{name: "pause", dir: ".", pkg: "./pause"}}}
	if err := c.build(t.Context(), io.Discard); err != nil {
		t.Fatal(err)
	}
	if err := copyFile(filepath.Join(c.bin(), "pause"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	var archives [2][]byte
	for i := range archives {
		out := filepath.Join(t.TempDir(), "x.tar")
		err := imageCommand([]string{"--name", "example.com/x:1", "--out", out, program})
		if err != nil {
			t.Fatal(err)
		}
		if archives[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("the same image has different bytes")
	}

	outer := untar(t, archives[0])
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(outer["manifest.json"], &manifest); err != nil || len(manifest) != 1 || len(manifest[0].Layers) != 1 {
		t.Fatalf("manifest %s: %v", outer["manifest.json"], err)
	}
	var config struct {
		Config struct {
			Entrypoint []string
			User       string
		}
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(outer[manifest[0].Config], &config); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(config.Config.Entrypoint, []string{"/pause"}) || config.Config.User != "65532" {
		t.Errorf("the configuration is %+v", config)
	}
	layer := outer[manifest[0].Layers[0]]
	if want := []string{"sha256:" + digest(layer)}; !slices.Equal(config.RootFS.DiffIDs, want) {
		t.Errorf("the layer is %v, not %v", config.RootFS.DiffIDs, want)
	}
	files := untar(t, layer)
	if len(files["pause"]) == 0 || !strings.Contains(string(files["etc/passwd"]), ":65532:") {
		t.Error("the layer lacks the program or its user")
	}

	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeImage(script+".tar", image{name: "x", binaries: []string{script}}); err == nil {
		t.Error("a script was taken for a static program")
	}
}

func untar(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestParseProcessStatus(t *testing.T) {
	const running = "Name:\tetcd\nState:\tS (sleeping)\nNSpid:\t8224\t7\nVmRSS:\t  2048 kB\nThreads:\t9\n"
	if got, want := parseProcessStatus(running), (process{innerPID: 7, memory: 2 << 20}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	const zombie = "State:\tZ (zombie)\nNSpid:\t8224\t7\nThreads:\t%\n"
	for threads, dead := range map[string]bool{"1": true, "3": false} {
		if got := parseProcessStatus(strings.Replace(zombie, "%", threads, 1)).dead; got != dead {
			t.Errorf("a zombie of %s threads is dead: %v", threads, got)
		}
	}
}

func TestTail(t *testing.T) {
	log := filepath.Join(t.TempDir(), "x.log")
	if err := os.WriteFile(log, []byte(strings.Repeat("line\n", 10000)+"last\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	got := strings.Split(tail(log), "\n")
	if len(got) != 20 || got[19] != "last" {
		t.Errorf("got %d lines, the last %q", len(got), got[len(got)-1])
	}
	if got := tail(log + ".none"); !strings.Contains(got, "no such file") {
		t.Errorf("of a file that is not there: %q", got)
	}
}

func TestUnit(t *testing.T) {
	l := layout{dir: t.TempDir()}
	for _, dir := range []string{"bin", "logs"} {
		if err := os.Mkdir(l.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// It runs until somebody removes its file.
	if err := os.WriteFile(l.bin("worker"), []byte("#!/bin/sh\necho start; while [ -e alive ]; do sleep 0.02; done\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	touch := func() {
		if err := os.WriteFile(l.path("alive"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	touch()
	n := node{logs: l.path("logs")}
	needed := newUnit(l, n, component{name: "needed"})
	u := newUnit(l, n, component{name: "worker", args: []string{"worker"}, ready: func(context.Context) error { return nil }})
	go u.run([]<-chan struct{}{needed.first})
	time.Sleep(50 * time.Millisecond)
	if got := u.snapshot(); got.State != stateWaiting || got.PID != 0 {
		t.Errorf("before what it needs is ready: %+v", got)
	}
	close(needed.first)
	wait := func(state string) {
		t.Helper()
		if err := u.waitFor(t.Context(), state, 10*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	wait(stateReady)

	if err := os.Remove(l.path("alive")); err != nil {
		t.Fatal(err)
	}
	wait(stateRestarting)
	touch()
	wait(stateReady)
	if got := u.snapshot(); got.Restarts == 0 {
		t.Errorf("after a restart: %+v", got)
	}

	for range 3 {
		if err := u.stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := u.snapshot(); got.State != stateStopped || got.PID != 0 {
			t.Errorf("after a stop: %+v", got)
		}
		if err := u.start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := u.stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := u.waitFor(t.Context(), stateReady, 0)
	if err == nil || !strings.Contains(err.Error(), "worker is stopped") || !strings.Contains(err.Error(), "start") {
		t.Errorf("a wait in vain says: %v", err)
	}
}

// TestProvisioner plays the API server with one claim through its life.
func TestProvisioner(t *testing.T) {
	var claims, volumes, posted, patched, deleted string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		answer := "{}"
		switch {
		case r.Method == http.MethodPost && posted != "":
			w.WriteHeader(http.StatusConflict)
			answer = `{"message": "it exists"}`
		case r.Method == http.MethodPost:
			posted = string(body)
		case r.Method == http.MethodPatch:
			patched += r.URL.Path + string(body)
		case r.Method == http.MethodDelete:
			deleted += r.URL.Path
		case r.URL.Path == claimsPath:
			answer = `{"items": [` + claims + `]}`
		case r.URL.Path == volumesPath:
			answer = `{"items": [` + volumes + `]}`
		}
		_, _ = io.WriteString(w, answer)
	}))
	defer server.Close()
	p := &localProvisioner{client: &apiClient{base: server.URL, http: server.Client()}, folder: t.TempDir(), node: "n"}
	reconcile := func() {
		t.Helper()
		if err := p.reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
	}

	const pending = `{"metadata": {"name": "c", "namespace": "ns", "uid": "u", "annotations": {
		"volume.kubernetes.io/storage-provisioner": "guildhall.dev/local"%}},
		"spec": {"accessModes": ["ReadWriteOncePod"], "resources": {"requests": {"storage": "1Gi"}}}, "status": {"phase": "Pending"}}`
	claims = strings.Replace(pending, "%", "", 1)
	reconcile()
	if posted != "" {
		t.Error("a volume was made before its pod had a node")
	}
	claims = strings.Replace(pending, "%", `, "volume.kubernetes.io/selected-node": "n"`, 1)
	reconcile()
	reconcile() // a list that is behind is no harm
	var made struct {
		Metadata objectMeta
		Spec     struct {
			AccessModes []string
			Local       struct{ Path string }
			ClaimRef    struct{ UID string }
		}
	}
	if err := json.Unmarshal([]byte(posted), &made); err != nil {
		t.Fatal(err)
	}
	if made.Metadata.Name != "pvc-u" || made.Spec.ClaimRef.UID != "u" || !slices.Equal(made.Spec.AccessModes, []string{"ReadWriteOncePod"}) {
		t.Errorf("the volume is %s", posted)
	}
	if info, err := os.Stat(made.Spec.Local.Path); err != nil || info.Mode().Perm() != 0o777 {
		t.Errorf("its folder: %v %v", info, err)
	}

	volume := `{"metadata": {"name": "pvc-u", "annotations": {"pv.kubernetes.io/provisioned-by": "guildhall.dev/local"}},
		"spec": {"capacity": {"storage": "1Gi"}, "persistentVolumeReclaimPolicy": "Delete", "local": {"path": "` + made.Spec.Local.Path + `"}},
		"status": {"phase": "%"}}`
	volumes = strings.Replace(volume, "%", "Bound", 1)
	claims = `{"metadata": {"name": "c", "namespace": "ns", "uid": "u", "annotations": {"volume.kubernetes.io/storage-provisioner": "guildhall.dev/local"}},
		"spec": {"volumeName": "pvc-u", "resources": {"requests": {"storage": "2Gi"}}}, "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}}}`
	reconcile()
	for _, want := range []string{volumesPath + "/pvc-u{", "/api/v1/namespaces/ns/persistentvolumeclaims/c/status{", `"2Gi"`} {
		if !strings.Contains(patched, want) {
			t.Errorf("to grow the volume, %q does not contain %q", patched, want)
		}
	}

	claims, volumes = "", strings.Replace(volume, "%", "Released", 1)
	reconcile()
	if _, err := os.Stat(made.Spec.Local.Path); err == nil || deleted != volumesPath+"/pvc-u" {
		t.Errorf("the claim is gone, not its folder or volume: %v, deleted %q", err, deleted)
	}
	volumes = strings.Replace(strings.Replace(volume, "%", "Released", 1), made.Spec.Local.Path, "/etc", 1)
	if err := p.reconcile(t.Context()); err == nil {
		t.Error("a folder outside of the provisioner's was removed")
	}
}
