/* The same by libtracecmd: all network events of a trace.dat, in time order, as columns. Prints their number and a sum. */
#include <event-parse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <trace-cmd.h>

#define MAX_ID 65536

struct known {
	int wanted;
	struct tep_format_field *skb, *len, *name;
};

struct columns {
	size_t n, room;
	unsigned long long *ts, *skb;
	unsigned int *len;
	unsigned short *cpu, *id;
	char (*name)[16];
};

static struct known by_id[MAX_ID];
static struct columns c;

static void learn(struct tep_handle *tep, const char *system, const char *event)
{
	struct tep_event *e = tep_find_event_by_name(tep, system, event);

	if (!e || e->id >= MAX_ID)
		return;
	by_id[e->id].wanted = 1;
	by_id[e->id].skb = tep_find_field(e, "skbaddr");
	by_id[e->id].len = tep_find_field(e, "len");
	by_id[e->id].name = tep_find_field(e, "name");
}

static void grow(void)
{
	c.room = c.room ? c.room * 2 : 1 << 16;
	c.ts = realloc(c.ts, c.room * sizeof(*c.ts));
	c.skb = realloc(c.skb, c.room * sizeof(*c.skb));
	c.len = realloc(c.len, c.room * sizeof(*c.len));
	c.cpu = realloc(c.cpu, c.room * sizeof(*c.cpu));
	c.id = realloc(c.id, c.room * sizeof(*c.id));
	c.name = realloc(c.name, c.room * sizeof(*c.name));
	if (!c.ts || !c.skb || !c.len || !c.cpu || !c.id || !c.name)
		exit(3);
}

static int one(struct tracecmd_input *handle, struct tep_record *record, int cpu, void *data)
{
	struct tep_handle *tep = data;
	unsigned long long value;
	int id = tep_data_type(tep, record);

	if (id < 0 || id >= MAX_ID || !by_id[id].wanted)
		return 0;
	if (c.n == c.room)
		grow();
	c.ts[c.n] = record->ts;
	c.cpu[c.n] = cpu;
	c.id[c.n] = id;
	c.skb[c.n] = 0;
	c.len[c.n] = 0;
	c.name[c.n][0] = 0;
	if (by_id[id].skb && !tep_read_number_field(by_id[id].skb, record->data, &value))
		c.skb[c.n] = value;
	if (by_id[id].len && !tep_read_number_field(by_id[id].len, record->data, &value))
		c.len[c.n] = value;
	if (by_id[id].name && !tep_read_number_field(by_id[id].name, record->data, &value))
		strncpy(c.name[c.n], (char *)record->data + (value & 0xffff), 15);
	c.n++;
	return 0;
}

int main(int argc, char **argv)
{
	static const char *const events[][2] = {
		{ "net", "net_dev_queue" },	       { "net", "net_dev_start_xmit" }, { "net", "netif_rx" },
		{ "net", "netif_receive_skb" },	       { "net", "napi_gro_receive_entry" },
		{ "skb", "skb_copy_datagram_iovec" }, { "skb", "consume_skb" },	{ "skb", "kfree_skb" },
	};
	struct tracecmd_input *handle;
	struct tep_handle *tep;
	unsigned long long sum = 0;

	tracecmd_set_loglevel(TEP_LOG_NONE);
	handle = argc == 2 ? tracecmd_open(argv[1], 0) : NULL;
	if (!handle)
		return 2;
	tep = tracecmd_get_tep(handle);
	for (size_t i = 0; i < sizeof(events) / sizeof(events[0]); i++)
		learn(tep, events[i][0], events[i][1]);
	int buffers = tracecmd_buffer_instances(handle);

	tracecmd_iterate_events(handle, NULL, 0, one, tep);
	for (int i = 0; i < buffers; i++) {
		struct tracecmd_input *instance = tracecmd_buffer_instance_handle(handle, i);

		if (instance)
			tracecmd_iterate_events(instance, NULL, 0, one, tep);
	}
	for (size_t i = 0; i < c.n; i++)
		sum += c.len[i];
	printf("%zu %llu\n", c.n, sum);
	return 0;
}
