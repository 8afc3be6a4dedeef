package directory

import (
	"fmt"
	"time"

	v1 "guildhall.dev/guildhall/api/v1"
	"guildhall.dev/guildhall/shardserver/guild"
	"guildhall.dev/guildhall/shardserver/guildlog"
	"guildhall.dev/guildhall/shardserver/snowflake"
	"guildhall.dev/guildhall/shardserver/store"
)

// open opens a guild that is placed here.
func (d *Directory) open(object *v1.Guild, c guild.Config) (*guild.Guild, error) {
	log, err := d.openLog(object, c)
	if err != nil {
		return nil, err
	}
	log.Retain(c.Retention)
	c.Log = log
	return guild.Open(c)
}

// openLog opens the log of a guild. One is born only where there cannot be one already: in memory, or on a disk that
// has none of the guild while the Guild's status names none. A log that the status names and the disk does not
// have is given up only by the Guild's annotation.
func (d *Directory) openLog(object *v1.Guild, c guild.Config) (guildlog.Log, error) {
	if d.o.Store == nil {
		log := guildlog.NewMemory(c.Retention, time.Now)
		return log, log.Commit(guild.Birth(c))
	}
	expected, err := expectedLog(object)
	if err != nil {
		return nil, err
	}
	owner := ownerOf(object)
	identity, found := d.o.Store.Identity(c.ID)
	if expected != (guildlog.ID{}) && object.Annotations[v1.AnnotationTakeOver] == expected.String() {
		if !found || identity.Instead != expected {
			return d.o.Store.Rebirth(c.ID, owner, expected, guild.Birth(c))
		}
		expected = identity.Log // it has been given up before
	}
	if !found && expected == (guildlog.ID{}) {
		return d.o.Store.Birth(c.ID, owner, guild.Birth(c))
	}
	log, err := d.o.Store.Log(c.ID, expected)
	if err != nil {
		return nil, err
	}
	if identity.Owner != owner {
		if err := d.o.Store.Assign(c.ID, owner); err != nil {
			return nil, err
		}
	}
	return log, nil
}

// expectedLog is the log on disk that a Guild's status names; zero when it names none, or one that was in memory.
func expectedLog(object *v1.Guild) (guildlog.ID, error) {
	named := object.Status.Placement.LogID
	if named == "" {
		return guildlog.ID{}, nil
	}
	id, err := guildlog.ParseID(named)
	if err != nil {
		return id, fmt.Errorf("status.placement.logID: %w", err)
	}
	if !id.Durable() {
		return guildlog.ID{}, nil
	}
	return id, nil
}

func ownerOf(object *v1.Guild) store.Owner {
	return store.Owner{Namespace: object.Namespace, Name: object.Name, UID: string(object.UID)}
}

// forget ends what is known of a Guild that is being deleted, and its log where that is asked for.
func (d *Directory) forget(object *v1.Guild) {
	uid := string(object.UID)
	if d.o.Store != nil && object.Spec.DeletionPolicy == v1.DeletionDelete {
		for _, id := range d.o.Store.Inventory() {
			if id.UID != uid {
				continue
			}
			if err := d.o.Store.Delete(id.Guild); err != nil {
				// Only a store that fails refuses this: the process ends, and the next one deletes.
				d.o.Logger.Error("log not erased", "guild", object.Name, "id", id.Guild, "error", err)
				return
			}
			d.o.Logger.Info("log erased", "guild", object.Name, "id", id.Guild, "log", id.Log)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.guilds, uid)
}

// stored are the identities on disk of guilds that are not among those.
func (d *Directory) stored(held map[snowflake.ID]bool) (rest []store.Identity) {
	if d.o.Store == nil {
		return nil
	}
	for _, id := range d.o.Store.Inventory() {
		if !held[id.Guild] {
			rest = append(rest, id)
		}
	}
	return rest
}
