// Package crd holds the CustomResourceDefinitions of Guild and GuildShard, for programs that
// judge a manifest without an API server.
package crd

import "embed"

// Bases has the generated CustomResourceDefinitions, one file each:
// bases/guildhall.dev_guilds.yaml and bases/guildhall.dev_guildshards.yaml.
//
//go:embed bases/*.yaml
var Bases embed.FS
