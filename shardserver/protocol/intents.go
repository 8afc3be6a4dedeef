package protocol

// Intents say which events a session receives; bit i is 1<<i.
// Source: https://docs.discord.com/developers/events/gateway#gateway-intents.
const (
	IntentGuilds                 = 1 << 0
	IntentGuildMembers           = 1 << 1
	IntentGuildModeration        = 1 << 2
	IntentGuildExpressions       = 1 << 3
	IntentGuildIntegrations      = 1 << 4
	IntentGuildWebhooks          = 1 << 5
	IntentGuildInvites           = 1 << 6
	IntentGuildVoiceStates       = 1 << 7
	IntentGuildPresences         = 1 << 8
	IntentGuildMessages          = 1 << 9
	IntentGuildMessageReactions  = 1 << 10
	IntentGuildMessageTyping     = 1 << 11
	IntentMessageContent         = 1 << 15
	IntentGuildScheduledEvents   = 1 << 16
	IntentAutoModerationConfig   = 1 << 20
	IntentAutoModerationExecute  = 1 << 21
	IntentGuildMessagePolls      = 1 << 24
	knownIntents                 = 1<<26 - 1
	intentsOfThreadMembersUpdate = IntentGuilds | IntentGuildMembers
)

// ValidIntents says whether a client may identify with these intents.
func ValidIntents(intents uint64) bool { return intents&^knownIntents == 0 }

// Event is what the server knows of a kind of dispatch.
type Event struct {
	// Intents of which a session needs one to receive it; 0: none is needed.
	Intents uint64
	// Volatile events have no number of their own and are not kept.
	Volatile bool
	// Reserved events are made by the server alone.
	Reserved bool
	// Content events have what users write in their body: see WithoutContent.
	Content bool
}

// EventOf returns what is known of the event named t. Unknown events go to every session.
func EventOf(t string) *Event {
	if e, ok := events[t]; ok {
		return e
	}
	return unknownEvent
}

var unknownEvent = &Event{}

var events = func() map[string]*Event {
	m := map[string]*Event{
		"READY": {Reserved: true}, "RESUMED": {Reserved: true}, NoopEvent: {Reserved: true},
		"GUILD_CREATE":          {Reserved: true, Intents: IntentGuilds},
		"GUILD_DELETE":          {Reserved: true, Intents: IntentGuilds},
		"THREAD_MEMBERS_UPDATE": {Intents: intentsOfThreadMembersUpdate},
		"TYPING_START":          {Intents: IntentGuildMessageTyping, Volatile: true},
		"PRESENCE_UPDATE":       {Intents: IntentGuildPresences, Volatile: true},
	}
	add := func(intents uint64, names ...string) {
		for _, n := range names {
			m[n] = &Event{Intents: intents}
		}
	}
	add(IntentGuilds, "GUILD_UPDATE", "GUILD_ROLE_CREATE", "GUILD_ROLE_UPDATE", "GUILD_ROLE_DELETE",
		"CHANNEL_CREATE", "CHANNEL_UPDATE", "CHANNEL_DELETE", "CHANNEL_PINS_UPDATE",
		"THREAD_CREATE", "THREAD_UPDATE", "THREAD_DELETE", "THREAD_LIST_SYNC", "THREAD_MEMBER_UPDATE",
		"STAGE_INSTANCE_CREATE", "STAGE_INSTANCE_UPDATE", "STAGE_INSTANCE_DELETE",
		"VOICE_CHANNEL_STATUS_UPDATE", "VOICE_CHANNEL_START_TIME_UPDATE")
	add(IntentGuildMembers, "GUILD_MEMBER_ADD", "GUILD_MEMBER_UPDATE", "GUILD_MEMBER_REMOVE")
	add(IntentGuildModeration, "GUILD_AUDIT_LOG_ENTRY_CREATE", "GUILD_BAN_ADD", "GUILD_BAN_REMOVE")
	add(IntentGuildExpressions, "GUILD_EMOJIS_UPDATE", "GUILD_STICKERS_UPDATE",
		"GUILD_SOUNDBOARD_SOUND_CREATE", "GUILD_SOUNDBOARD_SOUND_UPDATE",
		"GUILD_SOUNDBOARD_SOUND_DELETE", "GUILD_SOUNDBOARD_SOUNDS_UPDATE")
	add(IntentGuildIntegrations, "GUILD_INTEGRATIONS_UPDATE",
		"INTEGRATION_CREATE", "INTEGRATION_UPDATE", "INTEGRATION_DELETE")
	add(IntentGuildWebhooks, "WEBHOOKS_UPDATE")
	add(IntentGuildInvites, "INVITE_CREATE", "INVITE_DELETE")
	add(IntentGuildVoiceStates, "VOICE_STATE_UPDATE", "VOICE_CHANNEL_EFFECT_SEND")
	add(IntentGuildMessages, "MESSAGE_CREATE", "MESSAGE_UPDATE", "MESSAGE_DELETE", "MESSAGE_DELETE_BULK")
	add(IntentGuildMessageReactions, "MESSAGE_REACTION_ADD", "MESSAGE_REACTION_REMOVE",
		"MESSAGE_REACTION_REMOVE_ALL", "MESSAGE_REACTION_REMOVE_EMOJI")
	add(IntentGuildScheduledEvents, "GUILD_SCHEDULED_EVENT_CREATE", "GUILD_SCHEDULED_EVENT_UPDATE",
		"GUILD_SCHEDULED_EVENT_DELETE", "GUILD_SCHEDULED_EVENT_USER_ADD", "GUILD_SCHEDULED_EVENT_USER_REMOVE")
	add(IntentAutoModerationConfig, "AUTO_MODERATION_RULE_CREATE",
		"AUTO_MODERATION_RULE_UPDATE", "AUTO_MODERATION_RULE_DELETE")
	add(IntentAutoModerationExecute, "AUTO_MODERATION_ACTION_EXECUTION")
	add(IntentGuildMessagePolls, "MESSAGE_POLL_VOTE_ADD", "MESSAGE_POLL_VOTE_REMOVE")
	for _, n := range []string{"MESSAGE_CREATE", "MESSAGE_UPDATE", "AUTO_MODERATION_ACTION_EXECUTION"} {
		m[n].Content = true
	}
	return m
}()
