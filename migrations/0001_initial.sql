-- The first schema: jobs, what they may not outlive (their payloads), and their history.
--
-- All times are Unix milliseconds. A `*_at` column that is NULL says that it has not happened.
-- Facts that grow with a job's life are columns; only `state` is a state, and only
-- `store::jobs::transition` writes it.

CREATE TABLE jobs (
    id                  TEXT    NOT NULL PRIMARY KEY,   -- ULID, ours
    runner              TEXT    NOT NULL,               -- name in the configuration
    ci_url              TEXT    NOT NULL,               -- kept: the runner may leave the configuration first
    ci_job              INTEGER NOT NULL,
    ci_pipeline         INTEGER NOT NULL,
    project_id          INTEGER NOT NULL,
    project             TEXT    NOT NULL,               -- path with its groups
    name                TEXT    NOT NULL,               -- the job's name in the pipeline
    backend             TEXT    NOT NULL,               -- name in the configuration
    state               TEXT    NOT NULL CHECK (state IN ('received', 'submitting', 'submitted',
                                     'running', 'reporting', 'finished', 'abandoned')),
    submit_token        TEXT    UNIQUE,
    external_id         TEXT,
    outcome             TEXT,                           -- JSON; how it ended over there
    verdict             TEXT,                           -- JSON; what GitLab is told
    received_at         INTEGER NOT NULL,
    deadline_at         INTEGER NOT NULL,
    state_at            INTEGER NOT NULL,
    attempted_at        INTEGER,
    submitted_at        INTEGER,                        -- when the backend was known to have it
    started_at          INTEGER,
    ended_at            INTEGER,                        -- when we saw that it had ended
    observed_at         INTEGER,                        -- last news that changed something
    missing_since       INTEGER,                        -- first of the good answers it was absent from
    ci_confirmed_at     INTEGER,                        -- last word GitLab accepted
    cancel_requested_at INTEGER,
    cancel_requested_by TEXT    CHECK (cancel_requested_by IN ('gitlab', 'operator', 'deadline')),
    cancel_sent_at      INTEGER,
    released_at         INTEGER,
    host                TEXT,                           -- the machine it runs on
    waits_for           TEXT,                           -- the backend's reason, or our last error
    log_offset          INTEGER NOT NULL DEFAULT 0,     -- read from the backend
    log_ended           INTEGER NOT NULL DEFAULT 0,
    trace_carry         TEXT,                           -- JSON; how the next log byte goes on
    trace_len           INTEGER NOT NULL DEFAULT 0,     -- durable in the spool
    trace_sent          INTEGER NOT NULL DEFAULT 0,     -- accepted by GitLab
    trace_hole          INTEGER NOT NULL DEFAULT 0,     -- bytes were lost: no checksum can be given
    trace_interval      INTEGER NOT NULL DEFAULT 3000,  -- how often GitLab wants news, milliseconds
    slot                INTEGER NOT NULL,               -- smallest number free among the runner's jobs
    project_slot        INTEGER NOT NULL,               -- the same among those of the project
    workspace           TEXT,                           -- the checkout
    due_at              INTEGER NOT NULL,               -- look again then
    failures            INTEGER NOT NULL DEFAULT 0,     -- in a row; drives the back-off
    UNIQUE (ci_url, ci_job),
    CHECK (state NOT IN ('submitting', 'submitted', 'running') OR submit_token IS NOT NULL),
    CHECK (state NOT IN ('submitted', 'running') OR external_id IS NOT NULL),
    CHECK (external_id IS NULL OR submit_token IS NOT NULL),
    CHECK (state NOT IN ('reporting', 'finished') OR verdict IS NOT NULL),
    CHECK (released_at IS NULL OR state IN ('finished', 'abandoned')),
    CHECK (trace_sent <= trace_len)
) STRICT;

-- A row is owed work while it is not released; this predicate drives every sweep.
CREATE INDEX jobs_due ON jobs (due_at) WHERE released_at IS NULL;

-- Counting what is in flight, and the slots in use.
CREATE INDEX jobs_owed ON jobs (runner, backend, state, project_id, slot, project_slot)
    WHERE released_at IS NULL;

-- Finding the smallest free slots without looking at every job.
CREATE INDEX jobs_slots ON jobs (runner, slot) WHERE released_at IS NULL;
CREATE INDEX jobs_project_slots ON jobs (runner, project_id, project_slot)
    WHERE released_at IS NULL;

-- Finding what was asked to end.
CREATE INDEX jobs_cancel ON jobs (backend)
    WHERE released_at IS NULL AND cancel_requested_at IS NOT NULL AND ended_at IS NULL;

-- Retention, and `jobs list --since`.
CREATE INDEX jobs_received ON jobs (received_at);

-- What GitLab sent, secrets included. The row goes when the job is over. A table of its own, so that
-- writing a job's facts does not copy a payload of megabytes.
CREATE TABLE payloads (
    job        TEXT NOT NULL PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    ci_payload TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE job_events (
    job    TEXT    NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    seq    INTEGER NOT NULL,
    at     INTEGER NOT NULL,
    actor  TEXT    NOT NULL CHECK (actor IN ('agent', 'reconciler', 'operator')),
    event  TEXT    NOT NULL,
    detail TEXT,
    PRIMARY KEY (job, seq)
) STRICT, WITHOUT ROWID;
