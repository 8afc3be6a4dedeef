package controllers

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	accorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	acmetav1 "k8s.io/client-go/applyconfigurations/meta/v1"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"guildhall.dev/guildhall/shardserver/linkcert"
)

const (
	// linkCheck is how often a certificate of links is looked at; Secrets are not watched.
	linkCheck = 5 * time.Minute
	// trustFirst is how long a new authority is only trusted before it signs: by then all Secrets
	// name it, and all pods have read them.
	trustFirst = time.Hour
	// previousFile of the authority's Secret is the certificate before this one.
	previousFile = "previous.crt"
)

// linkCerts makes the certificates of links between shards and relays, and renews them in time.
type linkCerts struct {
	applier
	clock clock.PassiveClock

	mu          sync.Mutex
	authorities map[string]authority
	// checked is when a Secret was last found in order.
	checked map[types.NamespacedName]time.Time
}

// authority is what signs the certificates of a namespace.
type authority struct {
	signs *linkcert.Authority
	// renewed: its predecessor's certificates are still good.
	renewed bool
	// trusted are the certificates that both ends accept: its own and its predecessor's.
	trusted []byte
	read    time.Time
}

// The Secrets of links are named after shards and guilds, which no role can list; hence get and patch of any Secret
// by its name. Who may make pods can mount them all the same. Nobody here lists or watches Secrets.
// +kubebuilder:rbac:groups="",resources=secrets,verbs=get;create;patch;delete

// ensureAuthority makes the authority of a namespace, and a new one in time. It is never mounted.
func (c *linkCerts) ensureAuthority(ctx context.Context, namespace string) error {
	secret := new(corev1.Secret)
	err := c.live.Get(ctx, types.NamespacedName{Namespace: namespace, Name: authorityName}, secret)
	found := err == nil
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("reading Secret %s: %w", authorityName, err)
	}
	pair := linkcert.Pair{Cert: secret.Data[linkcert.CertFile], Key: secret.Data[linkcert.KeyFile]}
	now := c.clock.Now()
	if found && (secret.Labels[labelManagedBy] != managedBy || !linkcert.Due(pair, linkcert.Identity{}, nil, now)) {
		return nil // somebody else's is theirs to renew
	}
	next, err := linkcert.NewAuthority(namespace, now)
	if err != nil {
		return err
	}
	data := map[string][]byte{linkcert.CertFile: next.Cert, linkcert.KeyFile: next.Key}
	if len(pair.Cert) > 0 {
		data[previousFile] = pair.Cert
	}
	if found {
		base := secret.DeepCopy()
		secret.Data = data
		err = c.Patch(ctx, secret, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{}), client.FieldOwner(fieldManager))
	} else {
		secret = &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: authorityName, Labels: namespaceLabels()},
			Type:       corev1.SecretTypeTLS, Data: data,
		}
		err = client.IgnoreAlreadyExists(c.Create(ctx, secret, client.FieldOwner(fieldManager)))
	}
	if err != nil {
		return fmt.Errorf("writing Secret %s: %w", authorityName, err)
	}
	return nil
}

// errNoAuthority: the namespace's controller is about to make it.
var errNoAuthority = errors.New("the namespace has no authority for certificates yet")

// authority reads that of a namespace, at most every linkCheck.
func (c *linkCerts) authority(ctx context.Context, namespace string) (authority, error) {
	now := c.clock.Now()
	c.mu.Lock()
	a, ok := c.authorities[namespace]
	c.mu.Unlock()
	if ok && now.Sub(a.read) < linkCheck {
		return a, nil
	}
	secret := new(corev1.Secret)
	if err := c.live.Get(ctx, types.NamespacedName{Namespace: namespace, Name: authorityName}, secret); apierrors.IsNotFound(err) {
		return authority{}, errNoAuthority
	} else if err != nil {
		return authority{}, fmt.Errorf("reading Secret %s: %w", authorityName, err)
	}
	cert := secret.Data[linkcert.CertFile]
	signs, err := linkcert.ParseAuthority(linkcert.Pair{Cert: cert, Key: secret.Data[linkcert.KeyFile]})
	if err != nil {
		return authority{}, fmt.Errorf("reading Secret %s: %w", authorityName, err)
	}
	previous := secret.Data[previousFile]
	a = authority{signs: signs, trusted: append(bytes.Clone(cert), previous...), read: now}
	a.renewed = len(previous) > 0 && now.Sub(madeAt(cert)) < trustFirst
	c.mu.Lock()
	c.authorities[namespace] = a
	c.mu.Unlock()
	return a, nil
}

// madeAt is when a certificate began to be good.
func madeAt(cert []byte) time.Time {
	if block, _ := pem.Decode(cert); block != nil {
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			return c.NotBefore.Add(time.Hour) // linkcert dates them back for clocks that differ
		}
	}
	return time.Time{}
}

// ensure makes the Secret with the certificate of an identity, and a new certificate in time.
func (c *linkCerts) ensure(ctx context.Context, name string, id linkcert.Identity, labels map[string]string, owner *acmetav1.OwnerReferenceApplyConfiguration) error {
	key := types.NamespacedName{Namespace: id.Namespace, Name: name}
	now := c.clock.Now()
	c.mu.Lock()
	checked, known := c.checked[key]
	c.mu.Unlock()
	if known && now.Sub(checked) < linkCheck {
		return nil
	}
	by, err := c.authority(ctx, id.Namespace)
	if err != nil {
		return err
	}
	secret := new(corev1.Secret)
	found, err := c.findSecret(ctx, key, secret, *owner.UID)
	if err != nil {
		return err
	}
	pair := linkcert.Pair{Cert: secret.Data[linkcert.CertFile], Key: secret.Data[linkcert.KeyFile]}
	signer := by.signs
	if by.renewed {
		signer = nil // what its predecessor has signed is good for a while
	}
	due := linkcert.Due(pair, id, signer, now)
	if found && !due && bytes.Equal(secret.Data[linkcert.AuthorityFile], by.trusted) && controllerOf(secret) == *owner.UID {
		c.found(key, now)
		return nil
	}
	if due {
		if pair, err = by.signs.Issue(id, now); err != nil {
			return err
		}
	}
	desired := accorev1.Secret(name, id.Namespace).
		WithLabels(labels).WithOwnerReferences(owner).WithType(corev1.SecretTypeTLS).
		WithData(map[string][]byte{linkcert.CertFile: pair.Cert, linkcert.KeyFile: pair.Key, linkcert.AuthorityFile: by.trusted})
	if err := c.write(ctx, key, secret, desired, found); err != nil {
		return err
	}
	c.found(key, now)
	return nil
}

func (c *linkCerts) found(key types.NamespacedName, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.checked[key] = now
}

// drop removes a Secret of links, or only forgets it where it is to stay.
func (c *linkCerts) drop(ctx context.Context, key types.NamespacedName, owner types.UID) error {
	c.forget(key)
	secret := new(corev1.Secret)
	found, err := c.findSecret(ctx, key, secret, owner)
	if isNameConflict(err) || err == nil && !found {
		return nil
	}
	if err != nil {
		return err
	}
	uid := secret.UID
	if err := c.Delete(ctx, secret, client.Preconditions{UID: &uid}); err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("deleting Secret %s: %w", key.Name, err)
	}
	return nil
}

// forget has a Secret looked at again when it is next wanted.
func (c *linkCerts) forget(key types.NamespacedName) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.checked, key)
}

// findSecret is find for Secrets, which the cache does not hold.
func (c *linkCerts) findSecret(ctx context.Context, key types.NamespacedName, secret *corev1.Secret, owner types.UID) (bool, error) {
	err := c.live.Get(ctx, key, secret)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading Secret %s: %w", key.Name, err)
	}
	if controller := controllerOf(secret); secret.Labels[labelManagedBy] != managedBy || controller != "" && controller != owner {
		return true, &nameConflictError{kind: "Secret", name: key.Name}
	}
	return true, nil
}

// controllerOf is the uid of an object's controller, if it has one.
func controllerOf(obj client.Object) types.UID {
	if c := metav1.GetControllerOf(obj); c != nil {
		return c.UID
	}
	return ""
}
