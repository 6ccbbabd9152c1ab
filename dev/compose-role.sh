#!/bin/bash
# Run by the image of Postgres when it makes its data: the role that the service runs as. `regcred migrate --grant-to`
# gives it its rights.
set -euo pipefail
psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
    -v password="$REGCRED_SERVICE_PASSWORD" <<'SQL'
CREATE ROLE regcred_service LOGIN PASSWORD :'password';
SQL
