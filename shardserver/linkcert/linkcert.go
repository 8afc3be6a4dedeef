// Package linkcert makes and checks the certificates of the links between shard servers and relays. A
// namespace has one authority; a certificate says whose it is in a URI, and both ends of a link prove theirs:
//
//	guildhall://<namespace>/shard/<GuildShard>
//	guildhall://<namespace>/relay/<guild id>
package linkcert

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Names of the files of a directory, and of the entries of a Secret, that hold one side's certificate.
const (
	CertFile      = "tls.crt"
	KeyFile       = "tls.key"
	AuthorityFile = "ca.crt"
)

const (
	// AuthorityLifetime and Lifetime are how long authorities and certificates are good. They are
	// renewed when two thirds have passed.
	AuthorityLifetime = 10 * 365 * 24 * time.Hour
	Lifetime          = 30 * 24 * time.Hour
	// skew is how far clocks may be apart.
	skew = time.Hour
)

// Identity is who a certificate is of: a shard, or the relays of a guild.
type Identity struct {
	Namespace string
	// Shard is the name of a GuildShard, Guild the id of a guild; one of them is empty.
	Shard, Guild string
}

func (id Identity) uri() *url.URL {
	u := &url.URL{Scheme: "guildhall", Host: id.Namespace, Path: "/shard/" + id.Shard}
	if id.Guild != "" {
		u.Path = "/relay/" + id.Guild
	}
	return u
}

func (id Identity) String() string { return id.uri().String() }

// identityOf reads the identity of a certificate.
func identityOf(c *x509.Certificate) (id Identity, err error) {
	for _, u := range c.URIs {
		kind, name, ok := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
		if u.Scheme != "guildhall" || !ok || name == "" {
			continue
		}
		id.Namespace = u.Host
		switch kind {
		case "shard":
			id.Shard = name
			return id, nil
		case "relay":
			id.Guild = name
			return id, nil
		}
	}
	return id, errors.New("linkcert: the certificate is neither of a shard nor of a relay")
}

// Authority signs the certificates of a namespace.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Pair is a certificate and its key, in PEM.
type Pair struct{ Cert, Key []byte }

// NewAuthority makes an authority.
func NewAuthority(namespace string, now time.Time) (Pair, error) {
	template := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "Guildhall links of " + namespace},
		NotBefore: now.Add(-skew), NotAfter: now.Add(AuthorityLifetime),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	return sign(template, nil)
}

// ParseAuthority reads what NewAuthority made.
func ParseAuthority(p Pair) (*Authority, error) {
	pair, err := tls.X509KeyPair(p.Cert, p.Key)
	if err != nil {
		return nil, fmt.Errorf("linkcert: authority: %w", err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return nil, errors.New("linkcert: expected the certificate of an authority with an ECDSA key")
	}
	return &Authority{cert: pair.Leaf, key: key}, nil
}

// Issue makes a certificate.
func (a *Authority) Issue(id Identity, now time.Time) (Pair, error) {
	template := &x509.Certificate{
		Subject:   pkix.Name{CommonName: id.String()[:min(len(id.String()), 64)]},
		NotBefore: now.Add(-skew), NotAfter: now.Add(Lifetime), URIs: []*url.URL{id.uri()},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	return sign(template, a)
}

// sign makes a key for the certificate and has it signed by the authority, or by itself.
func sign(template *x509.Certificate, by *Authority) (p Pair, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return p, err
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return p, err
	}
	if by == nil {
		by = &Authority{cert: template, key: key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, &key.PublicKey, by.key)
	if err != nil {
		return p, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return p, err
	}
	return Pair{
		Cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		Key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}),
	}, nil
}

// Due says whether a certificate should be made anew: it cannot be read, is of somebody else, was not signed by
// the authority, or two thirds of its time have passed. The zero id stands for anybody, nil for any authority.
func Due(p Pair, id Identity, by *Authority, now time.Time) bool {
	pair, err := tls.X509KeyPair(p.Cert, p.Key)
	if err != nil {
		return true
	}
	c := pair.Leaf
	if id != (Identity{}) {
		if of, err := identityOf(c); err != nil || of != id {
			return true
		}
	}
	if by != nil && c.CheckSignatureFrom(by.cert) != nil {
		return true
	}
	life := c.NotAfter.Sub(c.NotBefore)
	return now.Before(c.NotBefore) || now.After(c.NotBefore.Add(life/3*2))
}

// Files is a directory with a certificate, its key and the authorities that are trusted. It is read again
// when they change; while they are unreadable the last ones count.
type Files struct {
	dir string

	mu    sync.Mutex
	read  [3][]byte
	pair  *tls.Certificate
	roots *x509.CertPool
	id    Identity
}

// Load reads a directory.
func Load(dir string) (*Files, error) {
	f := &Files{dir: dir}
	if err := f.refresh(); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *Files) refresh() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var now [3][]byte
	same := true
	for i, name := range []string{CertFile, KeyFile, AuthorityFile} {
		data, err := os.ReadFile(filepath.Join(f.dir, name))
		if err != nil {
			return fmt.Errorf("linkcert: %w", err)
		}
		now[i] = data
		same = same && bytes.Equal(data, f.read[i])
	}
	if same {
		return nil
	}
	pair, err := tls.X509KeyPair(now[0], now[1])
	if err != nil {
		return fmt.Errorf("linkcert: %s: %w", f.dir, err)
	}
	id, err := identityOf(pair.Leaf)
	if err != nil {
		return fmt.Errorf("%w: %s", err, f.dir)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(now[2]) {
		return fmt.Errorf("linkcert: %s has no certificate", filepath.Join(f.dir, AuthorityFile))
	}
	f.read, f.pair, f.roots, f.id = now, &pair, roots, id
	return nil
}

// current is the certificate and the authorities now.
func (f *Files) current() (*tls.Certificate, *x509.CertPool, Identity) {
	_ = f.refresh() // the last ones count
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pair, f.roots, f.id
}

// Identity is whose certificate it is.
func (f *Files) Identity() Identity {
	_, _, id := f.current()
	return id
}

// Server is the TLS configuration of a shard: only relays of its namespace come in.
func (f *Files) Server() *tls.Config {
	return f.config(func(own, peer Identity) bool { return peer.Guild != "" && peer.Namespace == own.Namespace })
}

// Client is the TLS configuration of a relay: only a shard of its namespace answers.
func (f *Files) Client() *tls.Config {
	return f.config(func(own, peer Identity) bool { return peer.Shard != "" && peer.Namespace == own.Namespace })
}

func (f *Files) config(accept func(own, peer Identity) bool) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			pair, _, _ := f.current()
			return pair, nil
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, _, _ := f.current()
			return pair, nil
		},
		// What a name would prove, the identity proves; VerifyConnection checks the rest, on resumption as well.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection: func(state tls.ConnectionState) error {
			_, roots, own := f.current()
			peer, err := PeerOf(state)
			if err != nil {
				return err
			}
			if _, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
				return fmt.Errorf("linkcert: certificate of %s: %w", peer, err)
			}
			if !accept(own, peer) {
				return fmt.Errorf("linkcert: %s is not admitted by %s", peer, own)
			}
			return nil
		},
	}
}

// PeerOf is who the other end of a connection is.
func PeerOf(state tls.ConnectionState) (Identity, error) {
	if len(state.PeerCertificates) == 0 {
		return Identity{}, errors.New("linkcert: the other end has no certificate")
	}
	return identityOf(state.PeerCertificates[0])
}

// Write puts a certificate into a directory, as Load reads it.
func Write(dir string, p Pair, authority []byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, data := range map[string][]byte{CertFile: p.Cert, KeyFile: p.Key, AuthorityFile: authority} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}
