// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Maps, as the kernel has them: the same errors, rows that stay where they are, and a deleted row's memory given to the
 * next row at once, which is what the programs have to expect (bpf_mem_alloc, 6.1). One processor. LRU maps are far larger
 * than a run needs, so that they evict nothing.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "native.h"

static struct native_map *maps;
static int map_count, locks;

static int is_array(const struct native_map *map)
{
	return map->type == BPF_MAP_TYPE_ARRAY || map->type == BPF_MAP_TYPE_PERCPU_ARRAY;
}

void maps_open(void)
{
	maps = native_maps(&map_count);
	for (int i = 0; i < map_count; i++) {
		struct native_map *map = &maps[i];

		/* Rows keep their alignment: index, key, value, each on eight bytes. */
		map->row_size = is_array(map) ? (map->value_size + 7) / 8 * 8
					      : 8 + (map->key_size + 7) / 8 * 8 + (map->value_size + 7) / 8 * 8;
		map->memory = calloc(map->max_entries, map->row_size);
		if (!map->memory)
			abort();
		/* The object's first member is a pointer that only its declaration needs. */
		memcpy(map->object, &map, sizeof(map));
	}
}

void maps_reset(void)
{
	for (int i = 0; i < map_count; i++) {
		struct native_map *map = &maps[i];

		if (is_array(map))
			memset(map->memory, 0, (size_t)map->max_entries * map->row_size);
		memset(map->buckets, 0, sizeof(map->buckets));
		map->free = map->used = map->count = 0;
	}
}

struct native_map *map_named(const char *name)
{
	for (int i = 0; i < map_count; i++)
		if (!strcmp(maps[i].name, name))
			return &maps[i];
	abort();
}

static __u32 *row_next(const struct native_map *map, __u32 row)
{
	return (__u32 *)(map->memory + (size_t)(row - 1) * map->row_size);
}

static unsigned char *row_key(const struct native_map *map, __u32 row)
{
	return (unsigned char *)row_next(map, row) + 8;
}

static unsigned char *row_value(const struct native_map *map, __u32 row)
{
	return row_key(map, row) + (map->key_size + 7) / 8 * 8;
}

static __u32 *bucket_of(struct native_map *map, const void *key)
{
	const unsigned char *bytes = key;
	__u32 hash = 2166136261u;

	for (__u32 i = 0; i < map->key_size; i++)
		hash = (hash ^ bytes[i]) * 16777619u;
	return &map->buckets[(hash ^ hash >> 16) & 255];
}

/* The link that leads to the row, for its removal; NULL: there is no such row. */
static __u32 *row_find(struct native_map *map, const void *key)
{
	for (__u32 *link = bucket_of(map, key); *link; link = row_next(map, *link))
		if (!memcmp(row_key(map, *link), key, map->key_size))
			return link;
	return NULL;
}

static int prefix_matches(const unsigned char *a, const unsigned char *b, __u32 bits)
{
	if (memcmp(a, b, bits / 8))
		return 0;
	return !(bits % 8) || !((a[bits / 8] ^ b[bits / 8]) >> (8 - bits % 8));
}

/* The longest prefix that holds the key. */
static void *trie_lookup(struct native_map *map, const void *key)
{
	__u32 asked, best = 0, length = 0;

	memcpy(&asked, key, sizeof(asked));
	for (int i = 0; i < 256; i++) {
		for (__u32 row = map->buckets[i]; row; row = *row_next(map, row)) {
			__u32 bits;

			memcpy(&bits, row_key(map, row), sizeof(bits));
			if (bits > asked || (best && bits < length) ||
			    !prefix_matches(row_key(map, row) + 4, (const unsigned char *)key + 4, bits))
				continue;
			best = row;
			length = bits;
		}
	}
	return best ? row_value(map, best) : NULL;
}

void *map_lookup(struct native_map *map, const void *key)
{
	__u32 index, *link;

	if (map->type == BPF_MAP_TYPE_LPM_TRIE)
		return trie_lookup(map, key);
	if (is_array(map)) {
		memcpy(&index, key, sizeof(index));
		return index < map->max_entries ? map->memory + (size_t)index * map->row_size : NULL;
	}
	link = row_find(map, key);
	return link ? row_value(map, *link) : NULL;
}

static long row_insert(struct native_map *map, const void *key, const void *value)
{
	__u32 *bucket = bucket_of(map, key), row = map->free;

	if (map->count >= map->max_entries)
		return -E2BIG;
	if (row)
		map->free = *row_next(map, row);
	else
		row = ++map->used;
	map->count++;
	*row_next(map, row) = *bucket;
	memcpy(row_key(map, row), key, map->key_size);
	memcpy(row_value(map, row), value, map->value_size);
	*bucket = row;
	return 0;
}

long map_update(struct native_map *map, const void *key, const void *value, __u64 flags)
{
	void *known;

	if (flags > BPF_EXIST)
		return -EINVAL;
	if (is_array(map)) {
		known = map_lookup(map, key);
		if (!known || flags == BPF_NOEXIST)
			return known ? -EEXIST : -E2BIG;
	} else {
		__u32 *link = row_find(map, key);

		known = link ? row_value(map, *link) : NULL;
		if (known && flags == BPF_NOEXIST)
			return -EEXIST;
		if (!known)
			return flags == BPF_EXIST ? -ENOENT : row_insert(map, key, value);
	}
	memcpy(known, value, map->value_size);
	return 0;
}

long map_delete(struct native_map *map, const void *key)
{
	__u32 *link, row;

	if (is_array(map))
		return -EINVAL;
	link = row_find(map, key);
	if (!link)
		return -ENOENT;
	row = *link;
	*link = *row_next(map, row);
	*row_next(map, row) = map->free;
	map->free = row;
	map->count--;
	return 0;
}

const void *map_next(struct native_map *map, const void *previous, const void **value)
{
	__u32 row = 0;
	int bucket = 0;

	if (previous) {
		row = ((const unsigned char *)previous - 8 - map->memory) / map->row_size + 1;
		bucket = bucket_of(map, previous) - map->buckets + 1;
		row = *row_next(map, row);
	}
	while (!row && bucket < 256)
		row = map->buckets[bucket++];
	if (!row)
		return NULL;
	*value = row_value(map, row);
	return row_key(map, row);
}

int locks_held(void)
{
	return locks;
}

static struct native_map *map_of(void *object)
{
	struct native_map *map;

	memcpy(&map, object, sizeof(map));
	return map;
}

/* What programs call. The verifier allows no call while a lock is held. */

void *bpf_map_lookup_elem(void *map, const void *key)
{
	if (locks)
		abort();
	return map_lookup(map_of(map), key);
}

long bpf_map_update_elem(void *map, const void *key, const void *value, __u64 flags)
{
	if (locks)
		abort();
	if (!is_array(map_of(map)) && fault_is_due())
		return -ENOMEM;
	return map_update(map_of(map), key, value, flags);
}

long bpf_map_delete_elem(void *map, const void *key)
{
	if (locks)
		abort();
	return map_delete(map_of(map), key);
}

long bpf_spin_lock(struct bpf_spin_lock *lock)
{
	if (locks++)
		abort();
	lock->val = 1;
	return 0;
}

long bpf_spin_unlock(struct bpf_spin_lock *lock)
{
	if (!lock->val || --locks)
		abort();
	lock->val = 0;
	return 0;
}
