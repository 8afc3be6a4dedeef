package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"text/template"
	"time"
)

// An authority signs certificates. The cluster has three, so that a client of
// the API server is not by that a client of etcd or a front proxy.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// A cluster lives for days; clocks of virtual machines jump by minutes.
const (
	certificateLife = 365 * 24 * time.Hour
	clockSlack      = time.Hour
)

func newAuthority(name string) (*authority, error) {
	return (*authority)(nil).issue(&x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	})
}

// issue signs a certificate; a nil authority makes it sign itself.
func (a *authority) issue(request *x509.Certificate) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if request.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return nil, err
	}
	request.NotBefore = time.Now().Add(-clockSlack)
	request.NotAfter = time.Now().Add(certificateLife)
	parent, signer := request, key
	if a != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, request, parent, &key.PublicKey, signer)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, nil
}

// leaf makes a certificate for a client, and with hosts for a server as well.
func (a *authority) leaf(name string, groups []string, hosts ...string) (*authority, error) {
	request := &x509.Certificate{
		Subject:     pkix.Name{CommonName: name, Organization: groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			request.IPAddresses = append(request.IPAddresses, ip)
		} else {
			request.DNSNames = append(request.DNSNames, host)
		}
	}
	if len(hosts) > 0 {
		request.ExtKeyUsage = append(request.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	return a.issue(request)
}

func (a *authority) keyPEM() ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(a.key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

// save writes <name>.crt and <name>.key.
func (a *authority) save(l layout, name string) error {
	key, err := a.keyPEM()
	if err != nil {
		return err
	}
	if err := os.WriteFile(l.pki(name+".crt"), a.pem, 0o600); err != nil {
		return err
	}
	return os.WriteFile(l.pki(name+".key"), key, 0o600)
}

// writePKI makes every key, certificate and kubeconfig of a cluster.
func writePKI(l layout) error {
	authorities := map[string]*authority{}
	for _, name := range []string{"ca", "etcd-ca", "front-proxy-ca"} {
		a, err := newAuthority("guildhall-cluster-" + name)
		if err != nil {
			return err
		}
		authorities[name] = a
		if err := a.save(l, name); err != nil {
			return err
		}
	}
	n := l.node()

	type leaf struct {
		file, authority, name string
		groups, hosts         []string
	}
	leaves := []leaf{
		{file: "etcd", authority: "etcd-ca", name: "etcd", hosts: []string{"localhost", "127.0.0.1"}},
		{file: "etcd-client", authority: "etcd-ca", name: "kube-apiserver"},
		{file: "front-proxy", authority: "front-proxy-ca", name: "front-proxy"},
		{file: "apiserver", authority: "ca", name: "kube-apiserver", hosts: []string{
			"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + clusterDomain,
			"localhost", "127.0.0.1", kubernetesIP, n.ip(),
		}},
		{file: "apiserver-kubelet-client", authority: "ca", name: kubeletClientUser},
		{file: "supervisor", authority: "ca", name: "guildhall-supervisor", groups: []string{"system:masters"}},
	}
	for _, n := range l.nodes() {
		leaves = append(leaves, leaf{
			file: n.kubelet(), authority: "ca", name: "system:node:" + n.name, groups: []string{"system:nodes"}, hosts: []string{n.name, n.ip()},
		})
	}
	for _, leaf := range leaves {
		cert, err := authorities[leaf.authority].leaf(leaf.name, leaf.groups, leaf.hosts...)
		if err != nil {
			return err
		}
		if err := cert.save(l, leaf.file); err != nil {
			return err
		}
	}

	// Tokens of service accounts are signed with a bare key pair.
	accounts, err := newAuthority("service-accounts")
	if err != nil {
		return err
	}
	if err := accounts.save(l, "service-accounts"); err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(&accounts.key.PublicKey)
	if err != nil {
		return err
	}
	public = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	if err := os.WriteFile(l.pki("service-accounts.pub"), public, 0o600); err != nil {
		return err
	}

	type client struct {
		file, name string
		groups     []string
	}
	clients := []client{
		{l.kubeconfig(), "guildhall-admin", []string{"system:masters"}},
		{l.clientConfig("kube-controller-manager"), "system:kube-controller-manager", nil},
		{l.clientConfig("kube-scheduler"), "system:kube-scheduler", nil},
		{l.clientConfig("kube-proxy"), "system:kube-proxy", nil},
		{l.clientConfig("coredns"), dnsUser, nil},
	}
	for _, n := range l.nodes() {
		clients = append(clients, client{l.clientConfig(n.kubelet()), "system:node:" + n.name, []string{"system:nodes"}})
	}
	for _, client := range clients {
		cert, err := authorities["ca"].leaf(client.name, client.groups)
		if err != nil {
			return err
		}
		if err := writeKubeconfig(client.file, l.apiServerURL(), authorities["ca"], cert); err != nil {
			return err
		}
	}
	return nil
}

var kubeconfigTemplate = template.Must(template.New("kubeconfig").Parse(`apiVersion: v1
kind: Config
current-context: guildhall
clusters:
- name: guildhall
  cluster:
    server: {{.Server}}
    certificate-authority-data: {{.CA}}
contexts:
- name: guildhall
  context: {cluster: guildhall, user: guildhall}
users:
- name: guildhall
  user:
    client-certificate-data: {{.Cert}}
    client-key-data: {{.Key}}
`))

func writeKubeconfig(path, server string, ca, client *authority) error {
	key, err := client.keyPEM()
	if err != nil {
		return err
	}
	encode := base64.StdEncoding.EncodeToString
	var out bytes.Buffer
	err = kubeconfigTemplate.Execute(&out, map[string]string{
		"Server": server, "CA": encode(ca.pem), "Cert": encode(client.pem), "Key": encode(key),
	})
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return os.WriteFile(path, out.Bytes(), 0o600)
}
