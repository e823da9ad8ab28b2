-- Payloads are sealed: encrypted with a key that lies outside the database, so that neither a copy of
-- the database nor the disk it was on gives away what GitLab sent.
--
-- A sealed payload is bytes, not text, and SQLite cannot change a column's type in place: a new table
-- takes the rows over. Nothing can be encrypted in SQL. What was readable so far gets the mark of an
-- envelope that is not closed, '0', and the store seals it right after this migration, before anything
-- else happens; `secure_delete` overwrites what was dropped.

CREATE TABLE payloads_sealed (
    job    TEXT NOT NULL PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    sealed BLOB NOT NULL                     -- '1', key's id, nonce, ciphertext; or '0' and text
) STRICT, WITHOUT ROWID;

INSERT INTO payloads_sealed (job, sealed)
    SELECT job, CAST('0' || ci_payload AS BLOB) FROM payloads;

DROP TABLE payloads;

ALTER TABLE payloads_sealed RENAME TO payloads;
