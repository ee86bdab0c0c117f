// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Pods' devices: whose they are, how the node is reached there, and by which of its addresses it hides clients. */
#include <string.h>
#include "world.h"

/* Pods of this node that have a device to themselves; those of PORT_B are all others of the bridge. */
static const struct {
	const char *address[FAMILIES];
	__u32 interface;
} pods[] = {
	{{"10.1.0.5", "fd01::5"}, PORT_A},
	{{"10.1.0.7", "fd01::7"}, VETH},
};

int is_pod_device(__u32 interface)
{
	return interface >= PORT_A && interface <= VETH;
}

__u32 world_device(const __u8 address[16])
{
	struct hop hop = route_of(address);
	__u8 pod[16];

	for (unsigned int i = 0; i < sizeof(pods) / sizeof(pods[0]); i++) {
		address_of(pods[i].address[!address_is_v4(address)], pod);
		if (!memcmp(pod, address, 16))
			return pods[i].interface;
	}
	return hop.way == WAY_FOUND && hop.interface == PODS ? PORT_B : hop.interface;
}

int world_is_for_node(const struct frame *frame)
{
	return !frame->pkt_type || (!world.pods_unknown && !memcmp(frame->bytes, world_gateway(frame->interface), 6));
}

const __u8 *world_station(__u32 interface)
{
	static __u8 station[6] = {2};

	station[5] = interface < PORT_A ? 1 : 0x10 + interface;
	return station;
}

/* Pods behind a bridge reach the node at the bridge's link address. */
const __u8 *world_gateway(__u32 interface)
{
	static const __u8 bridge[6] = {2, 0, 0, 0, 0, 0xb0};

	return interface == VETH ? world_station(interface) : bridge;
}

int world_own_address(__u32 interface, int is_ip6, __u8 own[16])
{
	const char *const *text = interface == UPLINK ? node_address : tunnel_address;

	if (is_pod_device(interface)) {
		if (world.pods_unknown || world.pods_own == OWN_NONE || world.pods_own == OWN_STRANGE)
			return 0;
		text = world.pods_own == OWN_NODE ? node_address : tunnel_address;
	}
	address_of(text[is_ip6], own);
	return text == node_address || !world.tunnel_is_strange;
}
