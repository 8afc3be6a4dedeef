package controllers

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

// node plays what a bare API server lacks: the StatefulSet controller, the kubelet and, behind
// the pods' addresses, shard servers that follow the Guilds' placement and report.
type node struct {
	t         *testing.T
	client    client.Client
	cache     cache.Cache
	namespace string

	mu sync.Mutex
	// trouble is what the kubelet says of a shard's next pods instead of starting them.
	trouble map[string]corev1.ContainerState
	// fails says why a guild, by name, cannot be opened; opening ones never finish.
	fails   map[string]string
	opening map[string]bool
	servers map[string]*shardServer // by pod name
	silent  map[string]bool         // by shard: the report cannot be had
	crowds  map[string]*crowd       // by the name of their guild
	pods    int
	// deleted has the pods in the order in which they were deleted, and how many others were ready then.
	deleted []deletedPod
}

type deletedPod struct {
	name        string
	othersReady int
}

// startNode runs a node for one namespace until the test ends.
func (s *apiServer) startNode(t *testing.T, namespace string) *node {
	t.Helper()
	n := &node{
		t: t, namespace: namespace, client: s.client(t, nodeAgent),
		trouble: map[string]corev1.ContainerState{}, fails: map[string]string{}, opening: map[string]bool{},
		servers: map[string]*shardServer{}, silent: map[string]bool{}, crowds: map[string]*crowd{},
	}
	var err error
	n.cache, err = cache.New(s.configAs(nodeAgent), cache.Options{
		Scheme: s.scheme, DefaultNamespaces: map[string]cache.Config{namespace: {}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = n.cache.Start(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, s := range n.servers {
			_ = s.http.Close()
		}
	})
	handle(ctx, t, n.cache, func(sts *appsv1.StatefulSet) { n.syncStatefulSet(ctx, sts) }, func(sts *appsv1.StatefulSet) { n.collect(ctx, sts) })
	handle(ctx, t, n.cache, func(*corev1.Pod) {}, func(pod *corev1.Pod) { n.podGone(ctx, pod) })
	handle(ctx, t, n.cache, n.guildChanged, n.guildGone)
	return n
}

func handle[T client.Object](ctx context.Context, t *testing.T, c cache.Cache, changed, gone func(T)) {
	t.Helper()
	var zero T
	obj := any(zero)
	switch any(zero).(type) {
	case *appsv1.StatefulSet:
		obj = new(appsv1.StatefulSet)
	case *corev1.Pod:
		obj = new(corev1.Pod)
	case *v1.Guild:
		obj = new(v1.Guild)
	}
	informer, err := c.GetInformer(ctx, obj.(client.Object))
	if err != nil {
		t.Fatal(err)
	}
	_, err = informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { changed(o.(T)) },
		UpdateFunc: func(_, o any) { changed(o.(T)) },
		DeleteFunc: func(o any) {
			if obj, ok := o.(T); ok {
				gone(obj)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
}

func revisionOf(template corev1.PodTemplateSpec) string {
	data, _ := json.Marshal(template)
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:5])
}

// syncStatefulSet does what the StatefulSet controller does with one replica and OnDelete.
func (n *node) syncStatefulSet(ctx context.Context, sts *appsv1.StatefulSet) {
	if sts.DeletionTimestamp != nil || ctx.Err() != nil {
		return
	}
	sts = sts.DeepCopy()
	revision := revisionOf(sts.Spec.Template)
	if sts.Status.ObservedGeneration != sts.Generation || sts.Status.UpdateRevision != revision {
		sts.Status.ObservedGeneration, sts.Status.UpdateRevision, sts.Status.Replicas = sts.Generation, revision, 1
		if err := n.client.Status().Update(ctx, sts); err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) && ctx.Err() == nil {
			n.t.Errorf("writing the status of StatefulSet %s: %v", sts.Name, err)
		}
	}
	n.startPod(ctx, sts, revision)
}

func (n *node) startPod(ctx context.Context, sts *appsv1.StatefulSet, revision string) {
	pod := &corev1.Pod{ObjectMeta: *sts.Spec.Template.ObjectMeta.DeepCopy(), Spec: *sts.Spec.Template.Spec.DeepCopy()}
	pod.Name, pod.Namespace = sts.Name+"-0", sts.Namespace
	pod.Labels[appsv1.ControllerRevisionHashLabelKey] = revision
	pod.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(sts, appsv1.SchemeGroupVersion.WithKind("StatefulSet"))}
	if err := n.client.Create(ctx, pod); err != nil {
		if !apierrors.IsAlreadyExists(err) && ctx.Err() == nil && !namespaceEnding(err) {
			n.t.Errorf("creating pod %s: %v", pod.Name, err)
		}
		return
	}
	n.mu.Lock()
	trouble, broken := n.trouble[sts.Name]
	n.mu.Unlock()
	if broken {
		n.setPodStatus(ctx, pod, corev1.PodPending, trouble, "")
		return
	}
	n.serve(ctx, pod, sts)
}

// serve starts the shard server of a pod and makes the pod Ready.
func (n *node) serve(ctx context.Context, pod *corev1.Pod, sts *appsv1.StatefulSet) {
	owner := metav1.GetControllerOf(sts)
	s := &shardServer{node: n, name: sts.Name, pod: pod.UID, guilds: map[string]*heldGuild{}}
	if owner != nil {
		s.uid = string(owner.UID)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		n.t.Error(err)
		return
	}
	s.address = listener.Addr().String()
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+report.Path, s.report)
	mux.HandleFunc("POST "+report.OrdersPath, s.takeOrders)
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: time.Second}
	go func() { _ = s.http.Serve(listener) }()

	n.mu.Lock()
	n.pods++
	s.boot = "boot-" + strconv.Itoa(n.pods)
	s.ip = fmt.Sprintf("10.0.%d.%d", n.pods/250, n.pods%250+1)
	n.servers[pod.Name] = s
	n.mu.Unlock()

	var guilds v1.GuildList
	if err := n.cache.List(ctx, &guilds); err == nil {
		for i := range guilds.Items {
			s.see(&guilds.Items[i])
		}
	}
	n.setPodStatus(ctx, pod, corev1.PodRunning, corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}, s.ip)
}

func (n *node) setPodStatus(ctx context.Context, pod *corev1.Pod, phase corev1.PodPhase, state corev1.ContainerState, ip string) {
	ready := corev1.ConditionFalse
	if ip != "" {
		ready = corev1.ConditionTrue
	}
	pod.Status = corev1.PodStatus{
		Phase: phase, PodIP: ip,
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: ready, LastTransitionTime: metav1.Now()}},
		ContainerStatuses: []corev1.ContainerStatus{{
			Name: containerName, State: state, Ready: ip != "", Image: pod.Spec.Containers[0].Image,
		}},
	}
	if ip != "" {
		pod.Status.PodIPs = []corev1.PodIP{{IP: ip}}
	}
	if err := n.client.Status().Update(ctx, pod); err != nil && ctx.Err() == nil && !apierrors.IsNotFound(err) {
		n.t.Errorf("writing the status of pod %s: %v", pod.Name, err)
	}
}

// collect does what the garbage collector does with a deleted StatefulSet's pod.
func (n *node) collect(ctx context.Context, sts *appsv1.StatefulSet) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: sts.Namespace, Name: sts.Name + "-0"}}
	_ = n.client.Delete(ctx, pod)
}

// podGone ends a pod's server and lets the StatefulSet make another pod.
func (n *node) podGone(ctx context.Context, pod *corev1.Pod) {
	n.mu.Lock()
	// The pod's successor may have come first.
	if s := n.servers[pod.Name]; s != nil && s.pod == pod.UID {
		_ = s.http.Close()
		delete(n.servers, pod.Name)
	}
	others := 0
	for name := range n.servers {
		if name != pod.Name {
			others++
		}
	}
	n.deleted = append(n.deleted, deletedPod{pod.Name, others})
	n.mu.Unlock()
	sts := new(appsv1.StatefulSet)
	if err := n.client.Get(ctx, client.ObjectKey{Namespace: n.namespace, Name: pod.Labels[labelShard]}, sts); err == nil {
		n.syncStatefulSet(ctx, sts)
	}
}

// dial leads from a pod's address to its shard server.
func (n *node) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	target := ""
	for _, s := range n.servers {
		if s.ip == host && port == strconv.Itoa(adminPort) && !n.silent[s.name] {
			target = s.address
		}
	}
	n.mu.Unlock()
	if target == "" {
		return nil, fmt.Errorf("%s: connection refused", address)
	}
	return new(net.Dialer).DialContext(ctx, network, target)
}

// set changes what the node does.
func (n *node) set(change func(*node)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change(n)
}

// mute makes a shard stop answering, also on connections that are open.
func (n *node) mute(shard string, silent bool) {
	n.set(func(n *node) { n.silent[shard] = silent })
}

func (n *node) eachServer(do func(*shardServer)) {
	n.mu.Lock()
	servers := make([]*shardServer, 0, len(n.servers))
	for _, s := range n.servers {
		servers = append(servers, s)
	}
	n.mu.Unlock()
	for _, s := range servers {
		do(s)
	}
}

func (n *node) guildChanged(g *v1.Guild) { n.eachServer(func(s *shardServer) { s.see(g) }) }
func (n *node) guildGone(g *v1.Guild)    { n.eachServer(func(s *shardServer) { s.drop(string(g.UID)) }) }

// shardServer reports as the real one does; its guilds are no more than their entries.
type shardServer struct {
	node                         *node
	name, uid, boot, ip, address string
	pod                          types.UID
	http                         *http.Server

	mu       sync.Mutex
	revision int64
	guilds   map[string]*heldGuild
	gone     []goneGuild
}

type heldGuild struct {
	report.Guild
	revision int64
}

type goneGuild struct {
	uid      string
	revision int64
}

// see opens a guild that is placed here, and stops one that is placed elsewhere or being deleted.
func (s *shardServer) see(g *v1.Guild) {
	p := g.Status.Placement
	uid := string(g.UID)
	switch {
	case p == nil:
		return // a status that was lost says nothing
	case p.ShardUID != s.uid || g.DeletionTimestamp != nil:
		s.drop(uid)
		return
	}
	s.node.mu.Lock()
	failure, opening := s.node.fails[g.Name], s.node.opening[g.Name]
	s.node.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.guilds[uid]; ok {
		return
	}
	s.revision++
	e := report.Guild{UID: uid, Namespace: g.Namespace, Name: g.Name, ID: g.Status.ID, State: report.Serving, LogID: "log-" + uid[:8], Epoch: 1}
	switch {
	case failure != "":
		e.State, e.Message, e.LogID, e.Epoch = report.Failed, failure, "", 0
	case opening:
		e.State, e.LogID, e.Epoch = report.Opening, "", 0
	}
	s.guilds[uid] = &heldGuild{e, s.revision}
}

func (s *shardServer) drop(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.guilds[uid]; ok {
		delete(s.guilds, uid)
		s.revision++
		s.gone = append(s.gone, goneGuild{uid, s.revision})
	}
}

// change alters the entry of a guild, by name.
func (s *shardServer) change(name string, change func(*report.Guild)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, g := range s.guilds {
		if g.Name == name {
			s.revision++
			change(&g.Guild)
			g.revision = s.revision
		}
	}
}

func (s *shardServer) report(w http.ResponseWriter, req *http.Request) {
	s.node.mu.Lock()
	defer s.node.mu.Unlock()
	if s.node.silent[s.name] {
		http.Error(w, "silent", http.StatusServiceUnavailable)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var relays []report.Relay
	for _, g := range s.guilds {
		if c := s.node.crowds[g.Name]; c != nil {
			relays = append(relays, c.account(&g.Guild)...)
			s.revision++
			g.revision = s.revision
		}
	}
	out := report.Report{BootID: s.boot, ShardName: s.name, ShardUID: s.uid, Version: "test", Revision: s.revision, Guilds: []report.Guild{}, Relays: relays}
	since, err := strconv.ParseInt(req.URL.Query().Get("since"), 10, 64)
	out.Complete = err != nil || req.URL.Query().Get("boot") != s.boot
	for _, g := range s.guilds {
		if out.Complete || g.revision > since {
			out.Guilds = append(out.Guilds, g.Guild)
		}
	}
	if !out.Complete {
		for _, g := range s.gone {
			if g.revision > since {
				out.Gone = append(out.Gone, g.uid)
			}
		}
	}
	_ = json.NewEncoder(w).Encode(out)
}
