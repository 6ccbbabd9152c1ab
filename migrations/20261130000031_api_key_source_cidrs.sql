-- Networks that an API key may be used from, as 10.0.0.0/8. NULL: any.
--
-- The previous binary does not read the column: it accepts the key from anywhere.

ALTER TABLE api_keys
    ADD COLUMN source_cidrs text[],
    ADD CONSTRAINT api_keys_source_cidrs_check CHECK (
        cardinality(source_cidrs) > 0 AND array_position(source_cidrs, NULL) IS NULL
    );
