/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What is known before the object is loaded. Frozen read-only data: the verifier knows the values and removes the
 * branches that they rule out, so that a helper which the kernel lacks is never seen by it.
 */
#ifndef KUBELANE_CONFIG_H
#define KUBELANE_CONFIG_H

struct config {
	/* Cookie of the namespace that the daemon serves: only there does loopback reach NodePorts. 0: the initial
	 * namespace's (the daemon could not ask: SO_NETNS_COOKIE is from 5.14). */
	__u64 host_netns_cookie;
	/* The kernel has bpf_set_retval (5.18); without it a refusal shows as EPERM. */
	__u32 has_set_retval;
	/* Source ports towards backends elsewhere: snat_ports of them from snat_first on, host order. */
	__u16 snat_first;
	__u16 snat_ports;
	/* Ports that clients get towards local backends in the place of their own: moved_ports of them, host order. */
	__u16 moved_first;
	__u16 moved_ports;
	/* Connections, refusals and drops are counted by Service. */
	__u32 counts_services;
	/* And what its clients and backends send each other. */
	__u32 counts_traffic;
	/* As many proved flows of TCP, and of all other protocols, have room in the table. */
	__u32 flows_tcp;
	__u32 flows_other;
	/* A FIN counts whatever its sequence number is. */
	__u32 tcp_be_liberal;
	/* Sockets of the node's own namespace are served, and no pod's (--socket-lb host). */
	__u32 host_sockets_only;
	/* Packets of pods are served: programs are on their devices. */
	__u32 has_pod_devices;
	/* Cluster IPs serve the wire as well. */
	__u32 external_cluster_ips;
};

const volatile struct config config = {};

static __always_inline int in_host_namespace(void *ctx)
{
	__u64 host = config.host_netns_cookie;

	if (!host)
		host = bpf_get_netns_cookie((void *)0);
	return bpf_get_netns_cookie(ctx) == host;
}

#endif
