-- What is not in order is asked for pull secret by pull secret: by whoever waits for a fan-out, again and again.
CREATE INDEX pull_secret_targets_not_in_order_idx ON pull_secret_targets (pull_secret_id, state) WHERE state <> 'synced';
-- Nothing was found by this one that the other one does not find.
DROP INDEX pull_secret_targets_state_idx;
