{{- define "hostdir.labels" -}}
app.kubernetes.io/name: hostdir
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "hostdir.selector" -}}
app.kubernetes.io/name: hostdir
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "hostdir.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .default }}
{{- end -}}
{{- end }}
