-- Trace of the change that made the current generation of a pull secret, so that the attempts of a fan-out, in any process,
-- can be linked to the request that caused them. Written only while traces are exported.
--
-- A table of its own: a column of pull_secrets would make an event of each trace. The previous binary does not know it, so
-- a row may be of an older generation than its pull secret.

CREATE TABLE pull_secret_traces (
    pull_secret_id uuid NOT NULL,
    generation bigint NOT NULL,
    -- W3C trace context: version, trace id, span id and flags.
    traceparent text NOT NULL,
    CONSTRAINT pull_secret_traces_pkey PRIMARY KEY (pull_secret_id),
    CONSTRAINT pull_secret_traces_pull_secret_id_fkey FOREIGN KEY (pull_secret_id)
        REFERENCES pull_secrets (id) ON DELETE CASCADE,
    CONSTRAINT pull_secret_traces_traceparent_check CHECK (octet_length(traceparent) = 55)
);
