-- The journal: what was decided, written before anything is done. SQLite, WAL,
-- synchronous=FULL. Only the daemon writes; everybody else reads, in short
-- transactions. Paths and names are bytes (BLOB), as the file system has them;
-- a text that quotes a name which is no UTF-8 is stored as BLOB too.
-- Times are Unix seconds, UTC. Migrations: PRAGMA user_version.

-- Small durable settings: pauses, the state of the accepted rule set, boots.
CREATE TABLE kept (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL                    -- JSON
) WITHOUT ROWID;

-- A rule's name has one number for ever, also when the rule is gone.
CREATE TABLE rule (
    id   INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);

-- A root is a watched directory; what is known of its file system tells a
-- returned mount from another one.
CREATE TABLE root (
    id     INTEGER PRIMARY KEY,
    path   BLOB NOT NULL UNIQUE,
    device INTEGER,                        -- st_dev when last accepted
    inode  INTEGER,
    fstype TEXT,
    source TEXT                            -- mount source (/proc/self/mountinfo)
);

CREATE TABLE dir (
    id   INTEGER PRIMARY KEY,
    root INTEGER NOT NULL REFERENCES root,
    path BLOB NOT NULL,                    -- below the root; '' is the root itself
    UNIQUE (root, path)
);

-- A rule took this version. Lives as long as the file, whatever is thinned.
-- Ordered by directory, because the scanner joins a whole directory at once.
CREATE TABLE claim (
    dir      INTEGER NOT NULL,
    name     BLOB NOT NULL,
    rule     INTEGER NOT NULL,             -- negative: as a marker of that rule; plus 2^40: only its companion; plus 2^41: left out by the batch
    size     INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,             -- decimal digits as BLOB beyond 64 bits: clocks say anything
    batch    INTEGER NOT NULL,             -- 0 or less: a CLAIM_* code of core/model.py
    time     INTEGER,                      -- when, where there is no batch to know it
    PRIMARY KEY (dir, name, rule, size, mtime_ns)
) WITHOUT ROWID;

-- A closed set of file versions that travel together; never changed, thinned to
-- its numbers (manifest NULL) when its run is final and old.
CREATE TABLE batch (
    id          INTEGER PRIMARY KEY,
    rule        INTEGER NOT NULL REFERENCES rule,
    captures    TEXT NOT NULL,             -- JSON: the group
    reason      TEXT NOT NULL,             -- which closing condition, with numbers
    closed_time REAL NOT NULL,
    files       INTEGER NOT NULL,
    bytes       INTEGER NOT NULL,
    request     TEXT,                      -- JSON: action, options rendered for this batch, captures
    manifest    TEXT                       -- JSON: [[root, dir, name, size, mtime_ns, role, flag, content], ...]
);
CREATE INDEX batch_rule ON batch (rule);  -- what a rule has done: `after` looks back by it
CREATE INDEX batch_whole ON batch (closed_time) WHERE manifest IS NOT NULL;  -- what thinning looks through

-- The rule's action applied to the batch of the same number.
CREATE TABLE run (
    id           INTEGER PRIMARY KEY REFERENCES batch,
    state        TEXT NOT NULL,
    final        INTEGER NOT NULL,         -- 1: nothing more happens by itself or by an operator
    because      TEXT NOT NULL,
    created_time REAL NOT NULL,
    changed_time REAL NOT NULL,
    attempts     INTEGER NOT NULL DEFAULT 0,
    destination  TEXT NOT NULL DEFAULT '',
    waits_on     TEXT,                     -- JSON list of runs that must end first
    retry_time   REAL,
    error        TEXT,
    hint         TEXT,
    output       TEXT                      -- JSON
);
CREATE INDEX run_open ON run (state) WHERE final = 0;

-- One try of a run, written before the provider is asked.
CREATE TABLE attempt (
    run          INTEGER NOT NULL,
    attempt      INTEGER NOT NULL,
    prepared     TEXT,                     -- JSON, opaque
    handle       TEXT,                     -- JSON, opaque
    made_time    REAL NOT NULL,
    ended_time   REAL,
    outcome      TEXT,
    PRIMARY KEY (run, attempt)
) WITHOUT ROWID;

CREATE TABLE transition (
    id         INTEGER PRIMARY KEY,
    run        INTEGER NOT NULL,
    from_state TEXT NOT NULL,
    to_state   TEXT NOT NULL,
    because    TEXT NOT NULL,
    time       REAL NOT NULL
);
CREATE INDEX transition_run ON transition (run);

-- What proved a run: a record a file with path, size, digest, to.
CREATE TABLE proof (
    run       INTEGER NOT NULL,
    attempt   INTEGER NOT NULL,
    time      REAL NOT NULL,
    members   TEXT NOT NULL,               -- JSON
    witnessed REAL NOT NULL DEFAULT 0,     -- seconds that daemons here had worked by then: clocks may be set, this not
    PRIMARY KEY (run, attempt)
) WITHOUT ROWID;

-- Sets of source files that were taken away, or were to be. Thinned like runs,
-- but it says itself where the copies are.
CREATE TABLE reclaim (
    id           INTEGER PRIMARY KEY,
    rule         INTEGER NOT NULL,
    run          INTEGER NOT NULL,         -- that took the files
    state        TEXT NOT NULL,            -- intended, confirmed, done, kept
    because      TEXT NOT NULL,
    bytes        INTEGER NOT NULL,
    proofs       TEXT NOT NULL,            -- JSON: [{"rule", "run", "time", "copies": [[path, to, digest], ...], "known_as"}]
    made_time    REAL NOT NULL,
    changed_time REAL NOT NULL
);
CREATE INDEX reclaim_open ON reclaim (id) WHERE state IN ('intended', 'confirmed');
CREATE INDEX reclaim_ended ON reclaim (changed_time);

CREATE TABLE reclaim_file (
    root     INTEGER NOT NULL,
    path     BLOB NOT NULL,
    reclaim  INTEGER NOT NULL REFERENCES reclaim,
    number   INTEGER NOT NULL,             -- in its set
    size     INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    inode    INTEGER NOT NULL,
    hidden   BLOB NOT NULL,                -- its name in the same directory while it is neither there nor gone
    place    TEXT NOT NULL DEFAULT '',     -- where it was found at the end
    PRIMARY KEY (root, path, reclaim)
) WITHOUT ROWID;
CREATE INDEX reclaim_file_set ON reclaim_file (reclaim, number);

-- Where the copies are that are all that is left: nothing may replace them.
CREATE TABLE sole (
    target  INTEGER NOT NULL,              -- 64 bits of the SHA-256 of `to`, and of what else that place is known by
    reclaim INTEGER NOT NULL,
    PRIMARY KEY (target, reclaim)
) WITHOUT ROWID;
CREATE INDEX sole_reclaim ON sole (reclaim);

-- `existing`: the first complete sweep of a healthy root after the rule was accepted.
CREATE TABLE baseline (
    rule INTEGER NOT NULL,
    root INTEGER NOT NULL,
    time REAL NOT NULL,
    PRIMARY KEY (rule, root)
) WITHOUT ROWID;

-- Durable marks on a rule's group: taken (`only_first`), succeeded (`after`), at.
CREATE TABLE group_mark (
    rule     INTEGER NOT NULL,
    captures TEXT NOT NULL,
    kind     TEXT NOT NULL,
    batch    INTEGER NOT NULL,
    time     REAL NOT NULL,
    PRIMARY KEY (rule, captures, kind)
) WITHOUT ROWID;

-- Counts that status shows without reading history.
CREATE TABLE tally (
    rule  INTEGER NOT NULL,
    state TEXT NOT NULL,
    runs  INTEGER NOT NULL,
    files INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (rule, state)
) WITHOUT ROWID;

CREATE TABLE alarm (
    id           INTEGER PRIMARY KEY,
    key          TEXT NOT NULL,
    what         TEXT NOT NULL,
    hint         TEXT NOT NULL,
    since_time   REAL NOT NULL,
    cleared_time REAL,
    acked_time   REAL,
    acked_by     TEXT
);
CREATE UNIQUE INDEX alarm_open ON alarm (key) WHERE cleared_time IS NULL;

-- Every order a person gave, and what became of it.
CREATE TABLE ordered (
    id       INTEGER PRIMARY KEY,
    order_id INTEGER NOT NULL,             -- its number in control.db, which may begin anew
    verb     TEXT NOT NULL,
    args     TEXT NOT NULL,                -- JSON
    who      TEXT NOT NULL,
    why      TEXT NOT NULL,
    answer   TEXT NOT NULL,                -- JSON
    time     REAL NOT NULL
);

-- Rule sets as accepted; the newest is in force.
CREATE TABLE rule_set (
    id     INTEGER PRIMARY KEY,
    time   REAL NOT NULL,
    source TEXT NOT NULL                   -- JSON: [{"file": ..., "text": ...}]
);

-- Which versions of the program wrote here, so that an older one can say what it needs.
CREATE TABLE program (
    id      INTEGER PRIMARY KEY,
    version TEXT NOT NULL,
    time    REAL NOT NULL
);
