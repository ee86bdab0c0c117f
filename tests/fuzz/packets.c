// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
#include <arpa/inet.h>
#include <string.h>
#include "../../bpf/abi.h"
#include "build.h"
#include "oracle.h"
#include "world.h"

enum {
	CLIENT_START = 1000, /* sequence numbers */
	BACKEND_START = 5000,
};

struct step steps[STEPS];
int step_count;

static __u8 filler[2048], padded[2 * FRAME_MAX];

static const char *const clients[][FAMILIES] = {
	{"198.51.100.7", "2001:db8::7"},
	{"198.51.100.8", "2001:db8::8"},
	{"203.0.113.9", "2001:db9::9"},
	{"10.244.1.5", "fd44::1:5"},
	{"10.1.0.5", "fd01::5"},
	{"10.0.0.9", "fd00::9"},
	{"127.0.0.1", "::1"},
	{"224.0.0.1", "ff02::1"},
	{"0.0.0.0", "::"},
	{"10.0.0.1", "fd00::1"},
	{"255.255.255.255", "fe80::1"},
	{"10.9.0.7", "fd09::7"},
	{"192.0.2.80", "2001:db8:80::80"},
	{"10.96.0.1", "fd96::1"},
	{"10.244.0.1", "fd44::1"},
	{"10.1.0.5", "fd01::5"},
	{"10.1.0.7", "fd01::7"},
	{"10.1.0.9", "fd01::9"},
};

/* The last one is no backend. */
static const char *const pods[][FAMILIES] = {
	{"10.1.0.5", "fd01::5"},
	{"10.1.0.6", "fd01::6"},
	{"10.1.0.7", "fd01::7"},
	{"10.1.0.9", "fd01::9"},
};

enum {
	CLIENTS = sizeof(clients) / sizeof(clients[0]),
	USUAL_CLIENTS = 3,
	PODS_HERE = sizeof(pods) / sizeof(pods[0]),
};

/* An earlier step whose packet can be read; NULL: none. */
static const struct step *earlier(__u8 which)
{
	const struct step *step;

	if (!step_count)
		return NULL;
	/* Mostly the last ones. */
	step = &steps[step_count - 1 - which % (step_count < 6 || which > 200 ? step_count : 6)];
	return step->program == COLLECT ? NULL : step;
}

static void set_numbers(struct content *content, const struct recipe *recipe)
{
	__u32 by[4] = {0, 100, 70000, 0x7fffffff};

	if (recipe->numbers & 0x0c)
		content->sequence += by[recipe->numbers & 3];
	if (recipe->numbers & 0xc0)
		content->acknowledgement += by[recipe->numbers >> 4 & 3];
}

static __u8 flags_of(const struct recipe *recipe, __u8 usual)
{
	return recipe->flags & 0x80 ? recipe->flags & 0x3f : usual;
}

/* What `recipe->device` says besides. */
enum {
	DEVICE_PODS = 0x40, /* by a pod's */
	DEVICE_CLUSTER_IP = 0x20, /* a request for the cluster IP */
	DEVICE_NO_PORT = 0x10, /* of which no Service has that port */
};

static const char *client_of(const struct recipe *recipe, int is_ip6)
{
	if (recipe->actor >= 224)
		return clients[recipe->actor % CLIENTS][is_ip6];
	if (recipe->device & DEVICE_PODS)
		return pods[recipe->actor % PODS_HERE][is_ip6];
	return clients[recipe->actor % USUAL_CLIENTS][is_ip6];
}

static int make_request(const struct recipe *recipe, struct content *content)
{
	const struct service *service = &world.services[recipe->service % SERVICES];

	content->is_ip6 = service->is_ip6;
	content->pair.protocol = service->protocol;
	content->pair.to = recipe->device & DEVICE_CLUSTER_IP ? service->cluster_ip : service->end;
	if ((recipe->device & DEVICE_CLUSTER_IP) && (recipe->device & DEVICE_NO_PORT))
		content->pair.to.port = htons(83);
	address_of(client_of(recipe, service->is_ip6), content->pair.from.address);
	content->pair.from.port = htons(recipe->port < 250 ? 5000 + recipe->port % 4 : 8080);
	if (recipe->port == 255)
		content->pair.from.port = service->end.port;
	content->flags = flags_of(recipe, FLAG_SYN);
	content->sequence = CLIENT_START;
	return 1;
}

/* Backend to client or, of a packet that came out for a client, client to backend. */
static int make_answer(const struct recipe *recipe, struct content *content)
{
	const struct step *step = earlier(recipe->actor);

	if (!step || step->after.shape != SHAPE_WHOLE)
		return 0;
	content->is_ip6 = step->after.is_ip6;
	content->pair = pair_reversed(&step->after.pair);
	content->flags = flags_of(recipe, step->after.flags & FLAG_ACK ? FLAG_ACK : FLAG_SYN | FLAG_ACK);
	content->sequence = step->after.flags & FLAG_ACK ? step->after.acknowledgement : BACKEND_START;
	content->acknowledgement = step->after.sequence + !!(step->after.flags & (FLAG_SYN | FLAG_FIN));
	return 1;
}

static int make_again(const struct recipe *recipe, struct content *content)
{
	const struct step *step = earlier(recipe->actor);

	if (!step || step->before.shape != SHAPE_WHOLE)
		return 0;
	content->is_ip6 = step->before.is_ip6;
	content->pair = step->before.pair;
	if (step->after.shape == SHAPE_WHOLE)
		content->like = step;
	content->flags = flags_of(recipe, FLAG_ACK);
	content->sequence = step->before.sequence + !!(step->before.flags & FLAG_SYN);
	content->acknowledgement = step->before.flags & FLAG_ACK ? step->before.acknowledgement : BACKEND_START + 1;
	return 1;
}

/* An error that the node itself has made. */
static int is_by_node(const struct recipe *recipe)
{
	return (recipe->service & 3) == 2;
}

/* From a router on the way, from the packet's destination, or from this node. */
static int make_error(const struct recipe *recipe, struct content *content)
{
	static const __u8 types[FAMILIES][4] = {{3, 3, 11, 12}, {1, 2, 3, 4}};
	const struct step *step = earlier(recipe->actor);
	__u32 length;

	if (!step || step->after.shape == SHAPE_BROKEN || step->out.length < step->out.l3 + 28)
		return 0;
	content->is_ip6 = step->after.is_ip6;
	content->pair.protocol = content->is_ip6 ? PROTO_ICMP6 : PROTO_ICMP;
	content->pair.to = step->after.pair.from;
	content->pair.from = step->after.pair.to;
	if (recipe->service & 1)
		address_of(content->is_ip6 ? "2001:db8:9::9" : "203.0.113.99", content->pair.from.address);
	else if (is_by_node(recipe))
		address_of(content->is_ip6 ? "fd00::1" : "10.0.0.1", content->pair.from.address);
	content->error_type = types[content->is_ip6][recipe->service >> 2 & 3];
	content->error_code = recipe->service >> 4 & 7;
	length = step->out.length - step->out.l3;
	content->payload = step->out.bytes + step->out.l3;
	content->payload_length = recipe->size < 128 ? 28 + recipe->size : length;
	if (content->payload_length > length)
		content->payload_length = length;
	if (recipe->size > 240)
		content->payload_length = 1300 + recipe->size;
	if (content->payload_length > 1300)
		content->payload = memcpy(padded, content->payload, length);
	return 1;
}

/* From a served address and port of this node to a client. */
static int make_own(const struct recipe *recipe, struct content *content)
{
	if (!make_request(recipe, content))
		return 0;
	content->pair = pair_reversed(&content->pair);
	content->flags = flags_of(recipe, FLAG_ACK);
	return 1;
}

static void make_raw(const struct recipe *recipe, struct frame *frame)
{
	const struct service *service = &world.services[recipe->service % SERVICES];
	__u8 *ip = frame->bytes + frame->l3;
	int is_ip6 = service->is_ip6;
	__u32 length = (is_ip6 ? 40 : 20) + recipe->size % 64;

	frame->protocol = is_ip6 ? 0x86dd : 0x0800;
	if (recipe->actor == 255)
		frame->protocol = recipe->id << 8;
	for (__u32 i = 0; i < length; i++)
		ip[i] = recipe->options[i % 8] ^ (recipe->options[7] & i);
	if (recipe->actor & 1)
		ip[0] = is_ip6 ? 0x60 : 0x45;
	if (recipe->actor & 2)
		memcpy(ip + (is_ip6 ? 24 : 16), service->end.address + (is_ip6 ? 0 : 12), is_ip6 ? 16 : 4);
	frame->length = frame->l3 + length;
	put_link(frame);
}

/* Keys of flows that are there, and of some that are not. */
static int make_collection(const struct recipe *recipe, struct frame *frame)
{
	struct native_map *tables[] = {map_named("flows4"), map_named("flows6")};
	struct flow_key keys[COLLECT_KEYS] = {};
	__u32 count = 0;

	for (int i = 0; i < 2; i++) {
		const void *key = NULL, *value;

		while (count < COLLECT_KEYS && (key = map_next(tables[i], key, &value))) {
			const struct flow_key4 *short_key = key;
			struct flow_key *to = &keys[count++];

			memcpy(to, key, i ? sizeof(*to) : 0);
			if (i)
				continue;
			memset(to->ends.source.bytes + 10, 0xff, 2);
			memset(to->ends.destination.bytes + 10, 0xff, 2);
			memcpy(to->ends.source.bytes + 12, &short_key->source, 4);
			memcpy(to->ends.destination.bytes + 12, &short_key->destination, 4);
			to->ends.source_port = short_key->source_port;
			to->ends.destination_port = short_key->destination_port;
			to->protocol = short_key->protocol;
		}
	}
	frame->l3 = 0;
	frame->length = COLLECT_HEAD + sizeof(keys) - recipe->cut;
	memcpy(frame->bytes + COLLECT_HEAD, keys, sizeof(keys));
	frame->protocol = 0;
	/* In a trace the daemon's own collection runs, which looks at all of them. */
	return !trace || (!recipe->cut && tables[0]->count + tables[1]->count <= COLLECT_KEYS);
}

/* What a packet that was passed on looks like when the stack has forwarded it. */
static int make_onward(const struct recipe *recipe, struct step *step)
{
	const struct step *passed = earlier(recipe->actor);

	if (!passed || passed->effects.action != -1 || passed->after.shape == SHAPE_BROKEN)
		return 0;
	step->in = passed->out;
	step->in.from = recipe->flags & 1 ? passed->in.interface : PODS;
	return 1;
}

/* By which device a pod's packet comes in, whatever it says. */
static __u32 pod_device_of(const struct recipe *recipe, const struct pair *pair)
{
	__u32 interface = world_device(pair->from.address);

	return is_pod_device(interface) ? interface : PORT_A + recipe->id % 3;
}

static int has_earlier(enum order order)
{
	return order == ORDER_AGAIN || order == ORDER_ANSWER || order == ORDER_ERROR;
}

/* By which device the packet would come in, or leave; answers whether it leaves. */
static int find_device(const struct recipe *recipe, struct frame *frame, const struct pair *pair, enum order order)
{
	const struct step *step = has_earlier(order) ? earlier(recipe->actor) : NULL;
	int leaves = order == ORDER_ONWARD || order == ORDER_OWN ||
		     (order != ORDER_REQUEST && world_is_here(pair->from.address));

	/* To what has left the node, or was sent back, an answer comes in there. To what was passed on it may be as it leaves. */
	if ((order == ORDER_ANSWER || (order == ORDER_ERROR && !is_by_node(recipe))) &&
	    (step->program >= OUT_ETHERNET || is_sent_back(step))) {
		frame->interface = step->in.interface;
		return 0;
	}
	if (order == ORDER_AGAIN) {
		frame->interface = step->in.interface;
		frame->from = step->in.from;
		return step->program >= OUT_ETHERNET;
	}
	if (order != ORDER_ONWARD && order != ORDER_OWN && (recipe->device & DEVICE_PODS)) {
		frame->interface = pod_device_of(recipe, pair);
		return 0;
	}
	frame->interface = world_device(leaves ? pair->to.address : pair->from.address);
	if (order == ORDER_REQUEST && frame->interface != UPLINK && frame->interface != TUNNEL)
		frame->interface = UPLINK;
	return leaves;
}

static enum program program_of(__u32 interface, int leaves)
{
	if (leaves)
		return interface == BARE ? OUT_BARE : OUT_ETHERNET;
	if (is_pod_device(interface))
		return IN_POD;
	return interface == BARE ? IN_BARE : IN_ETHERNET;
}

/* The device, and so the program. */
static void choose_device(const struct recipe *recipe, struct step *step, const struct pair *pair, enum order order)
{
	static const __u8 others[8] = {UPLINK, TUNNEL, PORT_A, BARE, PORT_B, VETH, UPLINK, TUNNEL};
	struct frame *frame = &step->in;
	int leaves = find_device(recipe, frame, pair, order);

	if (recipe->device & 0x80) {
		leaves ^= recipe->device & 1;
		frame->interface = others[recipe->device >> 1 & 7];
	}
	/* Programs are on outward devices and pods' only. */
	if (frame->interface != TUNNEL && frame->interface != BARE && !is_pod_device(frame->interface))
		frame->interface = UPLINK;
	if (trace && frame->interface == BARE)
		frame->interface = TUNNEL;
	step->program = program_of(frame->interface, leaves);
	frame->l3 = native_programs[step->program].l3;
	frame->pkt_type = 0;
	if (leaves)
		frame->pkt_type = 4;
	else
		frame->from = frame->interface;
}

/* A packet that was passed on may leave by a device with another link header than the one that it came in by. */
static void fit_link(struct frame *frame, __u32 had)
{
	if (had == frame->l3)
		return;
	frame->length = frame->length + frame->l3 - had;
	memmove(frame->bytes + frame->l3, frame->bytes + had, frame->length - frame->l3);
	put_link(frame);
}

/* A pod's frame: mostly to its gateway. Answers whether it is. The kernel knows of each frame whether it is its device's. */
static int set_stations(const struct recipe *recipe, struct frame *frame)
{
	static const __u8 strangers[2][6] = {{2, 0, 0, 0, 0, 9}, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff}};
	const __u8 *to = world_gateway(frame->interface);

	if (recipe->link >= 240)
		to = recipe->link % 3 < 2 ? strangers[recipe->link % 3] : world_station(frame->interface);
	memcpy(frame->bytes, to, 6);
	memcpy(frame->bytes + 6, "\x02\0\0\0\x01", 5);
	frame->bytes[11] = frame->interface;
	frame->pkt_type = to == strangers[1] ? 1 : memcmp(to, world_station(frame->interface), 6) ? 3 : 0;
	return world_is_for_node(frame);
}

/* Everything about the packet that is not in its bytes. Those that the kernel cannot be told of are not in a trace. */
static int set_link(const struct recipe *recipe, struct frame *frame, enum program program)
{
	int is_wire = program == IN_ETHERNET || program == IN_BARE;
	int is_usual = 1;

	frame->mark = recipe->link == 201 && (!trace || is_wire) ? 7 : 0;
	if (trace)
		return 1;
	if (is_wire && recipe->link >= 240) {
		frame->pkt_type = 1 + recipe->link % 3;
		is_usual = 0;
	}
	if ((recipe->link & 0xf0) == 0xe0) {
		frame->vlan_present = 1;
		frame->vlan = recipe->link & 1 ? 0x2000 : 0x2005;
		is_usual &= recipe->link & 1;
	}
	if ((recipe->link & 0xf0) == 0xd0) {
		frame->gso_size = recipe->link & 1 ? 100 : 1440;
		is_usual = 0;
	}
	return is_usual;
}

static void set_content(const struct recipe *recipe, struct content *content)
{
	static const __u16 sizes[8] = {0, 24, 100, 1, 1372, 1400, 1440, 7};
	static const __u8 lives[8] = {60, 60, 60, 60, 64, 2, 1, 0};

	if (!content->payload) {
		content->payload = filler;
		content->payload_length = sizes[recipe->size & 7];
	}
	content->ttl = lives[recipe->ttl & 7];
	content->id = recipe->id & 3;
	content->dont_fragment = recipe->shape & 8 || content->pair.protocol == PROTO_TCP;
	content->unchecked = (recipe->shape & 0x30) == 0x30 && !content->is_ip6;
	content->piece = SHAPE_WHOLE;
	if ((recipe->shape & 7) >= 6)
		content->piece = recipe->shape & 1 ? SHAPE_FIRST : SHAPE_PIECE;
	if (recipe->shape & 0x80)
		content->options = 1 + (recipe->shape >> 4 & 7);
	set_numbers(content, recipe);
}

/* Bits turned over, bytes missing. Not 0: something was. */
static int distort(const struct recipe *recipe, struct frame *frame)
{
	__u32 least = frame->l3 + (frame->protocol == 0x86dd ? 40 : 20);
	int is_distorted = 0;

	for (int i = 0; i < 2; i++) {
		__u32 at = frame->l3 + (recipe->flip_at[2 * i] | (recipe->flip_at[2 * i + 1] & 1) << 8);

		if (!(recipe->flips & 0x80 >> i) || !recipe->flip_by[i] || at >= frame->length)
			continue;
		frame->bytes[at] ^= recipe->flip_by[i];
		is_distorted = 1;
	}
	/* The kernel's test run wants the IP header of an IP frame, and drivers see to it. */
	if (recipe->cut >= 160 && frame->length > least) {
		frame->length = least + (recipe->cut - 160) % (frame->length - least);
		is_distorted = 1;
	}
	return is_distorted;
}

static int make_content(const struct recipe *recipe, enum order order, struct content *content)
{
	switch (order) {
	case ORDER_ANSWER:
		return make_answer(recipe, content);
	case ORDER_AGAIN:
		return make_again(recipe, content);
	case ORDER_ERROR:
		return make_error(recipe, content);
	case ORDER_OWN:
		return make_own(recipe, content);
	default:
		return make_request(recipe, content);
	}
}

static enum order order_of(__u8 byte)
{
	static const enum order orders[16] = {
		ORDER_REQUEST, ORDER_REQUEST, ORDER_REQUEST, ORDER_REQUEST, ORDER_ANSWER, ORDER_ANSWER,
		ORDER_ANSWER,  ORDER_ANSWER,  ORDER_AGAIN,   ORDER_AGAIN,   ORDER_AGAIN,  ORDER_ERROR,
		ORDER_ONWARD,  ORDER_OWN,     ORDER_RAW,     ORDER_COLLECT,
	};

	return orders[byte & 15];
}

int packet_make(const struct recipe *recipe, struct step *step)
{
	enum order order = order_of(recipe->order);
	struct content content = {};
	struct frame *frame = &step->in;
	int is_usual, is_regular, is_distorted;
	__u32 had;

	memset(step, 0, sizeof(*step));
	if (order == ORDER_COLLECT) {
		step->program = COLLECT;
		return make_collection(recipe, frame);
	}
	frame->summed = trace || recipe->sums < 128 ? SUM_NONE : recipe->sums < 192 ? SUM_COMPLETE : SUM_PARTIAL;
	if (order == ORDER_ONWARD) {
		if (!make_onward(recipe, step))
			return 0;
		content.pair = earlier(recipe->actor)->after.pair;
	} else if (!make_content(recipe, order, &content)) {
		return 0;
	}
	set_content(recipe, &content);
	had = frame->l3;
	choose_device(recipe, step, &content.pair, order);
	if (order == ORDER_ONWARD)
		fit_link(frame, had);
	is_usual = set_link(recipe, frame, step->program);
	if (order == ORDER_RAW)
		make_raw(recipe, frame);
	else if (order != ORDER_ONWARD)
		build(frame, &content, recipe);
	if (step->program == IN_POD && order != ORDER_ONWARD)
		is_usual &= set_stations(recipe, frame);
	is_regular = content.piece == SHAPE_WHOLE && !content.options && content.ttl > 2 && !recipe->numbers;
	is_distorted = distort(recipe, frame) || order == ORDER_ONWARD || content.unchecked;
	step->is_proper = !is_distorted && is_usual && is_regular && !(recipe->device & 0x80) &&
			  !(recipe->flags & 0x80) &&
			  ((order == ORDER_REQUEST && recipe->actor < 224) || order == ORDER_ANSWER);
	step->before = inet_read(frame->bytes, frame->length, frame->l3, frame->protocol == 0x86dd, 0);
	/* Only what is whole and right is summed by devices, or left to them. */
	if (frame->summed == SUM_PARTIAL && (is_distorted || step->before.shape != SHAPE_WHOLE))
		frame->summed = SUM_NONE;
	if (frame->summed == SUM_COMPLETE)
		frame->sum = inet_sum(frame->bytes + frame->l3, frame->length - frame->l3);
	return 1;
}
