-- What a restart must not forget of two things.
--
-- A submission whose fate is unknown: its absence counts once it has had time to show itself. That time
-- begins when the process that attempted it has ended, and must not begin anew with each restart, or a
-- daemon that keeps being killed never submits it again.
--
-- Bringing a job home after its verdict: its caches are kept and its artifacts uploaded one by one. What
-- is done is not done again, and an upload is repeated from the same packed file.

ALTER TABLE jobs ADD COLUMN doubted_at INTEGER;      -- start of the first process after the one that attempted it
ALTER TABLE jobs ADD COLUMN cached_at INTEGER;       -- when its caches were kept, or given up
ALTER TABLE jobs ADD COLUMN brought_at INTEGER;      -- when nothing of it was left to bring home

-- Verdicts from before this were told without anything to bring home.
UPDATE jobs SET brought_at = state_at WHERE state IN ('reporting', 'finished', 'abandoned');

CREATE TABLE uploads (
    job        TEXT    NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    entry      INTEGER NOT NULL,               -- its place among the payload's artifacts
    packed     TEXT,                           -- JSON; what must be known to upload its packed file
    tries      INTEGER NOT NULL DEFAULT 0,     -- how often GitLab was asked to take it and did not
    silent     INTEGER NOT NULL DEFAULT 0,     -- attempts in a row that nobody answered
    packed_at  INTEGER,                        -- when the packed file was whole on disk
    settled_at INTEGER,                        -- when GitLab had it, or it was given up
    problem    TEXT,                           -- why it was given up
    PRIMARY KEY (job, entry),
    CHECK ((packed IS NULL) = (packed_at IS NULL))
) STRICT, WITHOUT ROWID;
