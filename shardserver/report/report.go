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
	Load Load     `json:"load"`
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
	LastSeq  uint64 `json:"lastSeq"`
	Members  int64  `json:"members"`
	Online   int64  `json:"online"`
	Sessions int64  `json:"sessions"`
}

// Load of a shard server, averaged over the last 10 s where it is a rate.
type Load struct {
	Sessions            int64 `json:"sessions"`
	EventsPerSecond     int64 `json:"eventsPerSecond"`
	DeliveriesPerSecond int64 `json:"deliveriesPerSecond"`
	CPUMilli            int64 `json:"cpuMilli"`
	MemoryBytes         int64 `json:"memoryBytes"`
	DiskUsedBytes       int64 `json:"diskUsedBytes"`
}
