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

{{- /* The arguments of external-provisioner in both modes. */ -}}
{{- define "hostdir.provisionerArgs" -}}
- --csi-address=/csi/csi.sock
- --strict-topology
- --immediate-topology=false
# CreateVolume gets the name and namespace of the claim.
- --extra-create-metadata
- --enable-capacity
- --capacity-poll-interval={{ .Values.provisioner.capacityPollInterval }}
- --kube-api-qps={{ .Values.provisioner.kubeApiQPS }}
- --kube-api-burst={{ .Values.provisioner.kubeApiBurst | int64 }}
- --kube-api-capacity-qps={{ .Values.provisioner.kubeApiCapacityQPS }}
- --kube-api-capacity-burst={{ .Values.provisioner.kubeApiCapacityBurst | int64 }}
- --capacity-threads={{ .Values.provisioner.capacityThreads | int64 }}
- --timeout=30s
{{- end }}

{{- /* The leader election arguments of a sidecar. */ -}}
{{- define "hostdir.electionArgs" -}}
- --leader-election
# Another sidecar takes over at most 18.8 s after a leader is gone; up to 9 s without the API server do not change the leader.
- --leader-election-lease-duration=10s
- --leader-election-renew-deadline=9s
- --leader-election-retry-period=2s
{{- end }}

{{- define "hostdir.elected" -}}
{{- if eq .Values.mode "elected" }}true{{ end -}}
{{- end }}

{{- /* The service account of the pods on nodes. */ -}}
{{- define "hostdir.nodeAccount" -}}
{{ .Release.Name }}{{ if include "hostdir.elected" . }}-node{{ end }}
{{- end }}

{{- define "hostdir.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .default }}
{{- end -}}
{{- end }}

{{- /* The directories of the node that pools need, without duplicates, as a JSON list. */ -}}
{{- define "hostdir.poolMounts" -}}
{{- $paths := list -}}
{{- range .Values.pools -}}
{{- if and .requireMount (eq (dir .path) "/") -}}
{{- fail (printf "pool %s: %s lies directly in /, which cannot be mounted into a container; with requireMount, put the pool deeper, such as /mnt%s" .name .path .path) -}}
{{- end -}}
{{- $paths = append $paths (ternary (dir .path) .path (.requireMount | default false)) -}}
{{- end -}}
{{- $paths | uniq | toJson -}}
{{- end }}

{{- /* The name of the Lease of external-provisioner's election, as csi-lib-utils forms it. */ -}}
{{- define "hostdir.lease" -}}
{{ regexReplaceAll "[^a-zA-Z0-9-]" .Values.driverName "-" }}
{{- end }}

{{- /* The Leases of all sidecars that elect a leader, as a CEL list. external-resizer's is named after the driver, too. */ -}}
{{- define "hostdir.leases" -}}
["{{ include "hostdir.lease" . }}", "external-resizer-{{ include "hostdir.lease" . }}"]
{{- end }}

{{- /* The security context of the sidecars on nodes. */ -}}
{{- define "hostdir.sidecarSecurity" -}}
{{- if .Values.selinux -}}
privileged: true
{{- else -}}
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}
readOnlyRootFilesystem: true
{{- end }}

{{- /* The label selector of the pods on nodes. */ -}}
{{- define "hostdir.nodePods" -}}
app.kubernetes.io/instance={{ .Release.Name }},app.kubernetes.io/component=node
{{- end }}
