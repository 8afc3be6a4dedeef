package main

import "fmt"

// A manifest is an object that every cluster starts with.
type manifest struct{ path, yaml string }

func manifests(n node) []manifest {
	return []manifest{
		{"/apis/storage.k8s.io/v1/storageclasses/" + storageClass, fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: %s
  annotations: {storageclass.kubernetes.io/is-default-class: "true"}
provisioner: %s
reclaimPolicy: Delete
volumeBindingMode: WaitForFirstConsumer
allowVolumeExpansion: true
allowedTopologies:
- matchLabelExpressions:
  - {key: kubernetes.io/hostname, values: [%s]}
`, storageClass, provisioner, n.name)},

		// The API server's way to the kubelet, for logs and exec.
		{"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/kubelet-client", fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: kubelet-client}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:kubelet-api-admin"}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: %q}]
`, kubeletClientUser)},

		{"/apis/rbac.authorization.k8s.io/v1/clusterroles/system:coredns", `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: "system:coredns"}
rules:
- {apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
`},
		{"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/system:coredns", fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: "system:coredns"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:coredns"}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: %q}]
`, dnsUser)},

		// CoreDNS is no pod, so its Service has no selector.
		{"/api/v1/namespaces/kube-system/services/kube-dns", fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata:
  name: kube-dns
  namespace: kube-system
  labels: {k8s-app: kube-dns}
spec:
  clusterIP: %s
  ports:
  - {name: dns, protocol: UDP, port: 53, targetPort: %d}
  - {name: dns-tcp, protocol: TCP, port: 53, targetPort: %d}
`, dnsIP, dnsPort, dnsPort)},
		{"/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices/kube-dns", fmt.Sprintf(`
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kube-dns
  namespace: kube-system
  labels:
    kubernetes.io/service-name: kube-dns
    endpointslice.kubernetes.io/managed-by: guildhall-cluster
addressType: IPv4
endpoints:
- addresses: [%s]
  conditions: {ready: true}
ports:
- {name: dns, protocol: UDP, port: %d}
- {name: dns-tcp, protocol: TCP, port: %d}
`, n.ip(), dnsPort, dnsPort)},
	}
}
