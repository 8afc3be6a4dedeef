package controllers

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/report"
)

func TestGuildFromApplyToReady(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj())
	w.shardIs("shard-a", condReady, reasonServing)

	began := time.Now()
	w.create(makeGuild(w.namespace, "lobby").Obj())
	g := w.guildIs("lobby", reasonServing)
	t.Logf("Ready after %s", time.Since(began).Round(time.Millisecond))
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("Ready after %s, want less than 5 s", took)
	}
	shard := w.shard("shard-a")
	if p := g.Status.Placement; p.ShardName != "shard-a" || p.ShardUID != string(shard.UID) || p.LogID == "" || p.Epoch != 1 {
		t.Errorf("placement is %+v", p)
	}
	if want := "ws://guildhall-gateway." + w.namespace + ".svc/g/" + g.Status.ID + "/"; g.Status.Gateway.URL != want {
		t.Errorf("gateway.url is %q, want %q", g.Status.Gateway.URL, want)
	}

	update(w, "shard-a", func(s *v1.GuildShard) { s.Spec.Gateway = &v1.ShardGateway{FrontDoorURL: "wss://chat.example.org/x/"} })
	eventually(t, 10*time.Second, func() string {
		if got := w.guild("lobby").Status.Gateway.URL; got != "wss://chat.example.org/x/g/"+g.Status.ID+"/" {
			return "the address to follow the shard's frontDoorURL; it is " + got
		}
		return ""
	})
}

func TestGuildReasonsOnTheWayToServing(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.node.set(func(n *node) {
		n.trouble["shard-a"] = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull", Message: "not found"}}
		n.opening["slow"] = true
		n.fails["broken"] = "the disk is on fire"
	})
	w.create(makeGuild(w.namespace, "lobby").Obj())
	w.guildIs("lobby", "!"+reasonNoShard)

	w.create(makeShard(w.namespace, "shard-a").Obj())
	g := w.guildIs("lobby", "!"+reasonShardNotReady)
	eventually(t, 10*time.Second, func() string {
		if m := message(w.guild("lobby").Status.Conditions, condReady); m != `shard shard-a: ErrImagePull: the kubelet cannot get image "`+testImage+`"` {
			return "the pod's own reason in " + m
		}
		return ""
	})
	w.shardIs("shard-a", condReady, "!"+reasonImageNotFound)
	if reason(g.Status.Conditions, condPlaced) != reasonPlaced {
		t.Errorf("Placed is %s", reason(g.Status.Conditions, condPlaced))
	}

	// The image can be had now; the pod of the same revision is replaced by hand.
	w.node.set(func(n *node) { clear(n.trouble) })
	if err := w.client.Delete(t.Context(), get[corev1.Pod](w, "shard-a-0")); err != nil {
		t.Fatal(err)
	}
	w.guildIs("lobby", reasonServing)

	w.create(makeGuild(w.namespace, "slow").Obj(), makeGuild(w.namespace, "broken").Obj())
	w.guildIs("slow", "!"+reasonOpening)
	broken := w.guildIs("broken", "!"+reasonOpenFailed)
	if m := message(broken.Status.Conditions, condReady); m != "shard shard-a: the disk is on fire" {
		t.Errorf("the message is %q", m)
	}
	w.node.eachServer(func(s *shardServer) {
		s.change("slow", func(g *report.Guild) { g.State, g.LogID, g.Epoch = report.Serving, "log", 1 })
	})
	w.guildIs("slow", reasonServing)
}

func TestGuildIsDeletedWhenItsShardLetsGo(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj(), makeGuild(w.namespace, "lobby").Obj(), makeGuild(w.namespace, "unplaced").Pin("nowhere").Obj())
	lobby, unplaced := w.guildIs("lobby", reasonServing), w.guildIs("unplaced", "!"+reasonShardMissing)
	began := time.Now()
	for _, g := range []*v1.Guild{lobby, unplaced} {
		if err := w.client.Delete(t.Context(), g); err != nil {
			t.Fatal(err)
		}
	}
	w.gone(lobby)
	w.gone(unplaced)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("they went after %s, want at once", took)
	}
}

func TestGuildOfAShardThatFallsSilent(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Obj(), makeGuild(w.namespace, "lobby").Obj())
	w.guildIs("lobby", reasonServing)
	w.node.mute("shard-a", true)
	g := w.guildIs("lobby", "!"+reasonShardNotReady)
	if got := reason(g.Status.Conditions, condLoadFresh); got != "!"+reasonStale {
		t.Errorf("LoadFresh is %s", got)
	}
	w.shardIs("shard-a", condReady, "!"+reasonNotReporting)
	w.node.mute("shard-a", false)
	w.guildIs("lobby", reasonServing)

	// A process that has ended took its guilds along; the next one opens them again.
	first := w.shard("shard-a").Status.BootID
	if err := w.client.Delete(t.Context(), get[corev1.Pod](w, "shard-a-0")); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, func() string {
		if w.shard("shard-a").Status.BootID == first {
			return "another process"
		}
		return ""
	})
	w.guildIs("lobby", reasonServing)
}

func TestEventsTellOfTransitions(t *testing.T) {
	w := newWorld(t)
	w.operate()
	w.create(makeShard(w.namespace, "shard-a").Capacity(1).Obj(), makeGuild(w.namespace, "lobby").Obj())
	w.guildIs("lobby", reasonServing)
	w.create(makeGuild(w.namespace, "late").Obj())
	w.guildIs("late", "!"+reasonShardsFull)
	eventually(t, 10*time.Second, func() string {
		var events eventsv1.EventList
		if err := w.client.List(t.Context(), &events, client.InNamespace(w.namespace)); err != nil {
			return err.Error()
		}
		missing := map[string]bool{"Normal Placed lobby": true, "Normal Ready lobby": true, "Warning ShardsFull late": true, "Normal Ready shard-a": true}
		for _, e := range events.Items {
			delete(missing, e.Type+" "+e.Reason+" "+e.Regarding.Name)
			if e.Action == "" {
				t.Errorf("event %s has no action", e.Reason)
			}
		}
		for event := range missing {
			return "event " + event
		}
		return ""
	})
}
