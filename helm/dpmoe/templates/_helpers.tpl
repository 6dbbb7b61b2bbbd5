{{/*
Names are fixed, not made from the release's: ClusterRoles of the same name then make Helm refuse a
second release. Two operators would have two ledgers and grant the same budget twice.
*/}}
{{- define "dpmoe.operator" -}}
dpmoe-operator
{{- end }}

{{- define "dpmoe.selectorLabels" -}}
app.kubernetes.io/name: dpmoe
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "dpmoe.labels" -}}
app.kubernetes.io/name: dpmoe
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image by digest, else by tag, else by the chart's appVersion: (list root image). */}}
{{- define "dpmoe.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* The operator's ServiceAccount, as the subject of a binding. */}}
{{- define "dpmoe.subjects" -}}
- kind: ServiceAccount
  name: {{ include "dpmoe.operator" . }}
  namespace: {{ .Release.Namespace }}
{{- end }}
