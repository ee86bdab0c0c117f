// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The object under test, compiled for this machine. This is the only file that sees its source; the rest of the harness
 * knows the programs, the maps by their names, the rows of abi.h and the configuration.
 */
#include "../../bpf/kubelane.bpf.c"
#include <sys/mman.h>
#include <unistd.h>
#include "native.h"

/* Maps that the programs do not touch, those of sockets, are not here. `entries`: 0 as in the object. */
#define MAP(map, entries)                                                                                              \
	{                                                                                                              \
		.name = #map, .object = &map, .type = sizeof(*map.type) / sizeof(int), .key_size = sizeof(*map.key),   \
		.value_size = sizeof(*map.value),                                                                      \
		.max_entries = (entries) ? (entries) : sizeof(*map.max_entries) / sizeof(int)                          \
	}

static struct native_map maps[] = {
	MAP(frontends, 256),   MAP(slots, 1024),	 MAP(backends, 256),	    MAP(addresses, 256),
	MAP(affinities, 1024), MAP(counters, 0),	 MAP(new_affinities, 1024), MAP(source_ranges, 64),
	MAP(devices, 64),      MAP(pod_devices, 64),	 MAP(flows4, 1024),	    MAP(flows6, 1024),
	MAP(flow_locks, 0),    MAP(flow_limits, 0),	 MAP(flow_counts, 0),	    MAP(flow_openings, 0),
	MAP(outgoing, 1024),   MAP(handed, 1024),	 MAP(fragments, 1024),	    MAP(ports, 0),
	MAP(wire_filter, 0),   MAP(epochs, 0),		 MAP(known_routes, 0),	    MAP(answer_budgets, 0),
	MAP(scratches, 0),     MAP(service_counts, 256), MAP(listening, 0),	    MAP(service_traffic, 256),
	MAP(probes, 64),       MAP(probe_state, 0),
};

const struct native_program native_programs[] = {
	{"wire_in_ethernet", wire_in_ethernet, 14}, {"wire_in_bare", wire_in_bare, 0},
	{"pod_in_ethernet", pod_in_ethernet, 14},   {"wire_out_ethernet", wire_out_ethernet, 14},
	{"wire_out_bare", wire_out_bare, 0},	    {"flow_collect", flow_collect, 0},
};

struct native_map *native_maps(int *count)
{
	*count = sizeof(maps) / sizeof(maps[0]);
	return maps;
}

/* The configuration is read-only for the programs. */
void native_configure(__u16 snat_first, __u16 snat_ports, int tcp_be_liberal, __u32 flows, int external_cluster_ips)
{
	size_t page = sysconf(_SC_PAGESIZE);
	char *from = (char *)((unsigned long)&config / page * page);
	volatile struct config *writable = (volatile struct config *)&config;

	if (mprotect(from, (char *)(&config + 1) - from, PROT_READ | PROT_WRITE))
		abort();
	writable->snat_first = snat_first;
	writable->snat_ports = snat_ports;
	writable->moved_first = 61000;
	writable->moved_ports = 4536;
	writable->tcp_be_liberal = tcp_be_liberal;
	writable->flows_tcp = flows;
	writable->flows_other = flows;
	writable->counts_services = 1;
	writable->counts_traffic = 1;
	writable->has_pod_devices = 1;
	writable->external_cluster_ips = external_cluster_ips;
}
