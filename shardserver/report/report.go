// Package report has the shape of what a shard server tells the operator: GET /v1/report on
// the admin port.
package report

// Path of the report on a shard server's admin port.
const Path = "/v1/report"

// Report is a shard server's account of itself. Asked with the query boot=BootID and
// since=Revision, it holds only what changed after that revision; asked with another boot id or
// none, it holds everything and Complete is true.
type Report struct {
	// BootID names the process; it changes with each start.
	BootID string `json:"bootID"`
	// ShardName and ShardUID are those of the GuildShard that the process was started for.
	ShardName string `json:"shardName"`
	ShardUID  string `json:"shardUID"`
	// Version of the shard server.
	Version string `json:"version"`
	// Revision counts changes of Guilds in this process.
	Revision int64 `json:"revision"`
	// Complete: Guilds lists every guild that this shard holds.
	Complete bool `json:"complete"`
	// Durable: logs are on disk.
	Durable bool `json:"durable"`
	// DiskFull: nothing is appended, since too little of the disk is free.
	DiskFull bool `json:"diskFull,omitempty"`
	// Guilds held, or those that changed since the revision asked for. Counts alone
	// change a guild's entry as well.
	Guilds []Guild `json:"guilds"`
	// Gone lists the uids of guilds dropped since the revision asked for.
	Gone []string `json:"gone,omitempty"`
	// Relays are all that follow guilds of this shard, or did within the last minute, whatever revision was asked for.
	Relays []Relay `json:"relays,omitempty"`
	Load   Load    `json:"load"`
}

// State of a guild on a shard.
type State string

const (
	// Opening: the log is being opened.
	Opening State = "Opening"
	// Serving: clients can connect.
	Serving State = "Serving"
	// Failed: the log could not be opened; Guild.Message says why.
	Failed State = "Failed"
	// LogMissing: Failed, since the disk does not have the log that the Guild's status names.
	LogMissing State = "LogMissing"
	// Stored: the log is on disk, and is not served from here: its Guild was deleted, or is placed
	// elsewhere, or has lost its status.
	Stored State = "Stored"
)

// Guild is one guild of a Report.
type Guild struct {
	// UID, Namespace and Name are those of the Guild object; of a Stored log, those of its last one.
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// ID is the guild's snowflake.
	ID string `json:"id"`
	// LogID and Epoch of the log, empty and 0 until it is open.
	LogID   string `json:"logID,omitempty"`
	Epoch   int64  `json:"epoch,omitempty"`
	State   State  `json:"state"`
	Message string `json:"message,omitempty"`
	// LastSeq is the number of the log's newest record.
	LastSeq uint64 `json:"lastSeq"`
	Members int64  `json:"members"`
	// Online and Sessions count those of the relays, too.
	Online   int64 `json:"online"`
	Sessions int64 `json:"sessions"`
	// Direct is the sessions on the shard itself.
	Direct int64 `json:"direct,omitempty"`
	// Relayed: new connections are led to the relays.
	Relayed bool `json:"relayed,omitempty"`
	// Round is the last round of moves that the shard has taken orders of for its own sessions, and Asked how many
	// of them it has asked to leave in it.
	Round int64 `json:"round,omitempty"`
	Asked int64 `json:"asked,omitempty"`
}

// Relay is a relay's account of itself, which it gives over its link every second.
type Relay struct {
	// GuildUID is the uid of the Guild that it follows, Name that of its pod.
	GuildUID string `json:"guildUID"`
	Name     string `json:"name"`
	BootID   string `json:"bootID"`
	Version  string `json:"version"`
	// Attached: its link stands.
	Attached bool `json:"attached"`
	// AgeMillis is how old the account is, in milliseconds.
	AgeMillis int64 `json:"ageMillis"`
	// Ready: it has the history of the resume window and serves.
	Ready bool `json:"ready"`
	// LastSeq is the last number that it has.
	LastSeq             uint64 `json:"lastSeq"`
	Sessions            int64  `json:"sessions"`
	DeliveriesPerSecond int64  `json:"deliveriesPerSecond"`
	// ArrivalsPerSecond is how many clients connect, Waiting how many are held without being served.
	ArrivalsPerSecond int64 `json:"arrivalsPerSecond,omitempty"`
	Waiting           int64 `json:"waiting,omitempty"`
	// Draining: it lets its sessions go, by order or since it ends.
	Draining bool `json:"draining"`
	// Round is the last round of moves that it has taken orders of, and Asked how many sessions it has asked to
	// leave (op 7) in it.
	Round int64 `json:"round,omitempty"`
	Asked int64 `json:"asked,omitempty"`
}

// OrdersPath is where a shard server's admin port takes Orders: POST, answered 204.
const OrdersPath = "/v1/orders"

// Orders has sessions of one guild leave where they are: they are asked to reconnect (op 7), and come back wherever
// the guild's Service leads. Orders of an older term, or of a round older than one that has been seen, are refused with 409.
type Orders struct {
	GuildUID string `json:"guildUID"`
	// Term counts the leaders of the operator, Round the rounds of moves of the guild.
	Term  int64 `json:"term"`
	Round int64 `json:"round"`
	// Deadline, in Unix milliseconds: what has not been asked to leave then stays.
	Deadline int64   `json:"deadline"`
	Orders   []Order `json:"orders"`
}

// Order is for one relay, or for the shard's own sessions.
type Order struct {
	// Relay is the name of a pod; empty: the shard itself.
	Relay string `json:"relay,omitempty"`
	// Leave is how many sessions are asked to leave in this round, in all; All: every one, also those that come later.
	Leave int64 `json:"leave,omitempty"`
	All   bool  `json:"all,omitempty"`
	// PerSecond bounds how many are asked in a second.
	PerSecond int64 `json:"perSecond"`
}

// Load of a shard server, averaged over the last 10 s where it is a rate.
type Load struct {
	Sessions            int64 `json:"sessions"`
	EventsPerSecond     int64 `json:"eventsPerSecond"`
	DeliveriesPerSecond int64 `json:"deliveriesPerSecond"`
	CPUMilli            int64 `json:"cpuMilli"`
	MemoryBytes         int64 `json:"memoryBytes"`
	DiskUsedBytes       int64 `json:"diskUsedBytes"`
	// ArrivalsPerSecond is how many clients connect, Waiting how many are held without being served.
	ArrivalsPerSecond int64 `json:"arrivalsPerSecond,omitempty"`
	Waiting           int64 `json:"waiting,omitempty"`
}
