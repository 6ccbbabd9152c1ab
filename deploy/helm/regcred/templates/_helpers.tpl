{{- define "regcred.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains "regcred" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-regcred" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "regcred.selector" -}}
app.kubernetes.io/name: regcred
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "regcred.labels" -}}
{{ include "regcred.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "regcred.serviceAccount" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else if .Values.serviceAccount.create -}}
{{- include "regcred.fullname" . -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{- define "regcred.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "regcred.config" -}}
{{- range $name, $value := .Values.config }}
{{ $name }}: {{ toString $value | quote }}
{{- end }}
{{- end -}}

{{- define "regcred.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* Item of a projected volume: dict "secret" {name, key} "path" FILE. */ -}}
{{- define "regcred.projected" -}}
- secret:
    name: {{ .secret.name }}
    items:
      - key: {{ .secret.key }}
        path: {{ .path }}
{{- end -}}

{{- /* Deployment of a role: dict "root" $ "component" "api"|"worker" "args" […] "values" {…}. */ -}}
{{- define "regcred.deployment" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $shutdown := int (get $values.config "REGCRED_HTTP_SHUTDOWN_SECONDS" | default 20) -}}
{{- $start := int (get $values.config "REGCRED_DATABASE_START_TIMEOUT_SECONDS" | default 30) -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "regcred.fullname" $root }}-{{ .component }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "regcred.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  {{- if not (dig "autoscaling" "enabled" false .values) }}
  replicas: {{ .values.replicas }}
  {{- end }}
  revisionHistoryLimit: 5
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxSurge: 1
      maxUnavailable: 0
  selector:
    matchLabels:
      {{- include "regcred.selector" $root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
  template:
    metadata:
      labels:
        {{- with $values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
        {{- include "regcred.labels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
      annotations:
        # Restarts the pods after a change of the variables. A changed Secret needs no restart for keys, peppers and
        # certificates, which are read again.
        checksum/config: {{ include "regcred.config" $root | sha256sum }}
        {{- with $values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: {{ include "regcred.serviceAccount" $root }}
      automountServiceAccountToken: {{ $values.serviceAccount.mountToken }}
      enableServiceLinks: false
      {{- with $values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      # preStop, requests in flight, and the end of the process.
      terminationGracePeriodSeconds: {{ add $values.drainSeconds $shutdown 10 }}
      securityContext:
        runAsNonRoot: true
        runAsUser: 65532
        runAsGroup: 65532
        fsGroup: 65532
        seccompProfile:
          type: RuntimeDefault
      {{- if $values.migrations.enabled }}
      initContainers:
        - name: migrate
          image: {{ include "regcred.image" $root }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          args: [migrate, --grant-to, {{ $values.migrations.serviceRole }}]
          env:
            - name: REGCRED_DATABASE_URL_FILE
              value: /etc/regcred/owner/database-url
          envFrom:
            - configMapRef:
                name: {{ include "regcred.fullname" $root }}
          resources:
            {{- toYaml .values.resources | nindent 12 }}
          securityContext:
            {{- include "regcred.containerSecurity" $root | nindent 12 }}
          volumeMounts:
            - name: owner
              mountPath: /etc/regcred/owner
              readOnly: true
            {{- if $values.secrets.databaseCa.name }}
            - name: database-ca
              mountPath: /etc/regcred/database-ca
              readOnly: true
            {{- end }}
      {{- end }}
      containers:
        - name: regcred
          image: {{ include "regcred.image" $root }}
          imagePullPolicy: {{ $values.image.pullPolicy }}
          args: {{ toJson .args }}
          env:
            - name: REGCRED_HTTP_LISTEN
              value: {{ printf "%s:8080" $values.listenAddress | quote }}
            - name: REGCRED_OPERATIONS_LISTEN
              value: {{ printf "%s:8081" $values.listenAddress | quote }}
            - name: REGCRED_DATABASE_URL_FILE
              value: /etc/regcred/secrets/database-url
            - name: REGCRED_MASTER_KEYS_FILE
              value: /etc/regcred/secrets/master-keys
            - name: REGCRED_API_KEY_PEPPER_FILE
              value: /etc/regcred/secrets/api-key-pepper
            {{- if $values.secrets.outboundProxy.name }}
            - name: REGCRED_OUTBOUND_PROXY_FILE
              value: /etc/regcred/secrets/outbound-proxy
            {{- end }}
            {{- if and $values.secrets.tls.name (eq .component "api") }}
            - name: REGCRED_HTTP_TLS_CERTIFICATE_FILE
              value: /etc/regcred/tls/tls.crt
            - name: REGCRED_HTTP_TLS_KEY_FILE
              value: /etc/regcred/tls/tls.key
            {{- end }}
          envFrom:
            - configMapRef:
                name: {{ include "regcred.fullname" $root }}
          ports:
            {{- if eq .component "api" }}
            - name: api
              containerPort: 8080
              protocol: TCP
            {{- end }}
            - name: operations
              containerPort: 8081
              protocol: TCP
          startupProbe:
            httpGet: {path: /healthz, port: operations}
            periodSeconds: 2
            timeoutSeconds: 3
            # Postgres may be late by REGCRED_DATABASE_START_TIMEOUT_SECONDS; 30 s more for the rest.
            failureThreshold: {{ div (add $start 30) 2 }}
          livenessProbe:
            httpGet: {path: /healthz, port: operations}
            periodSeconds: 10
            timeoutSeconds: 3
            failureThreshold: 3
          readinessProbe:
            httpGet: {path: /readyz, port: operations}
            periodSeconds: 5
            timeoutSeconds: 3
            failureThreshold: 2
          {{- if semverCompare ">=1.30.0-0" $root.Capabilities.KubeVersion.Version }}
          lifecycle:
            preStop:
              sleep:
                seconds: {{ $values.drainSeconds }}
          {{- end }}
          resources:
            {{- toYaml .values.resources | nindent 12 }}
          securityContext:
            {{- include "regcred.containerSecurity" $root | nindent 12 }}
          volumeMounts:
            - name: secrets
              mountPath: /etc/regcred/secrets
              readOnly: true
            {{- if $values.secrets.databaseCa.name }}
            - name: database-ca
              mountPath: /etc/regcred/database-ca
              readOnly: true
            {{- end }}
            {{- if and $values.secrets.tls.name (eq .component "api") }}
            - name: tls
              mountPath: /etc/regcred/tls
              readOnly: true
            {{- end }}
      volumes:
        - name: secrets
          projected:
            defaultMode: 0440
            sources:
              {{- $secrets := $values.secrets }}
              {{- include "regcred.projected" (dict "secret" $secrets.databaseUrl "path" "database-url") | nindent 14 }}
              {{- include "regcred.projected" (dict "secret" $secrets.masterKeys "path" "master-keys") | nindent 14 }}
              {{- include "regcred.projected" (dict "secret" $secrets.apiKeyPepper "path" "api-key-pepper") | nindent 14 }}
              {{- if $secrets.outboundProxy.name }}
              {{- include "regcred.projected" (dict "secret" $secrets.outboundProxy "path" "outbound-proxy") | nindent 14 }}
              {{- end }}
        {{- if $values.migrations.enabled }}
        - name: owner
          projected:
            defaultMode: 0440
            sources:
              {{- include "regcred.projected" (dict "secret" $secrets.ownerDatabaseUrl "path" "database-url") | nindent 14 }}
        {{- end }}
        {{- if $secrets.databaseCa.name }}
        - name: database-ca
          projected:
            defaultMode: 0444
            sources:
              {{- include "regcred.projected" (dict "secret" $secrets.databaseCa "path" "ca.crt") | nindent 14 }}
        {{- end }}
        {{- if and $secrets.tls.name (eq .component "api") }}
        - name: tls
          secret:
            secretName: {{ $secrets.tls.name }}
            defaultMode: 0440
        {{- end }}
      {{- with $values.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if $values.topologySpread }}
      topologySpreadConstraints:
        {{- $component := .component }}
        {{- range $values.topologySpread }}
        - topologyKey: {{ . }}
          maxSkew: 1
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "regcred.selector" $root | nindent 14 }}
              app.kubernetes.io/component: {{ $component }}
        {{- end }}
      {{- end }}
{{- end -}}
