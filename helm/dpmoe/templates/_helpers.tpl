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

{{/* The name by which the API server knows the operator. */}}
{{- define "dpmoe.username" -}}
system:serviceaccount:{{ .Release.Namespace }}:{{ include "dpmoe.operator" . }}
{{- end }}

{{/* What outlives the release: the ledger, and what protects it. */}}
{{- define "dpmoe.keep" -}}
{{- if .Values.crds.keep -}}
annotations:
  helm.sh/resource-policy: keep
{{- end }}
{{- end }}

{{/* The annotation by which the ledger's CustomResourceDefinition and namespace may be deleted. */}}
{{- define "dpmoe.allowDeletion" -}}
dpmoe.dev/allow-deletion=forget-all-spent-budget
{{- end }}

{{/* Whether the object that is to be deleted carries it, in CEL. */}}
{{- define "dpmoe.deletionIsAllowed" -}}
{{- $annotation := splitList "=" (include "dpmoe.allowDeletion" .) -}}
oldObject.metadata.?annotations[?'{{ first $annotation }}'] == optional.of('{{ last $annotation }}')
{{- end }}

{{/* The claim of the anchor's volume. */}}
{{- define "dpmoe.anchorClaim" -}}
{{ .Values.anchor.existingClaim | default (printf "%s-anchor" (include "dpmoe.operator" .)) }}
{{- end }}

{{/* Variables as NAME=VALUE, in the order of their names. */}}
{{- define "dpmoe.variables" -}}
{{- $pairs := list -}}
{{- range $name, $value := . }}{{- $pairs = append $pairs (printf "%s=%s" $name $value) }}{{- end -}}
{{- join " " $pairs -}}
{{- end }}
