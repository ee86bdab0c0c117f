'use strict';
// Whatever comes from the daemon is put into the page as text, never as markup.
const $ = (id) => document.getElementById(id);
const numbers = new Intl.NumberFormat('en', {maximumFractionDigits: 1});
const HISTORY = 300;
const ENOUGH_MS = 250;
const LOST_MS = 5000;
const history = [];
let source = null;
let paused = false;
let wait = 0;
let lost = 0;

function element(tag, text = '', kind = '') {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function ago(seconds) {
  if (seconds === null) return 'never';
  if (seconds < 120) return `${seconds} s ago`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min ago`;
  return `${Math.floor(seconds / 3600)} h ago`;
}

const rate = (value) => (value === null ? '-' : numbers.format(value));
const percent = (share) => `${numbers.format(share * 100)}%`;

// The Service that is open: the page's fragment, which anybody may have written.
function asked() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return '';
  }
}

// Rows that stay are kept, so that what has the focus keeps it. A row: its key, its cells as text, and what a press on the
// first one does. `make` replaces the text of a cell.
function fill(body, rows, make = {}) {
  const focus = document.activeElement;
  const labels = [...body.parentElement.tHead.rows[0].cells].filter((head) => !head.hidden).map((head) => head.textContent);
  const known = new Map([...body.children].map((row) => [row.dataset.key, row]));
  let at = body.firstElementChild;
  for (const {key, cells, press, kinds = []} of rows) {
    let row = known.get(key);
    known.delete(key);
    if (!row || row.children.length !== cells.length) {
      if (row && row === at) at = at.nextElementSibling;
      row?.remove();
      row = element('tr');
      row.dataset.key = key;
      for (const index of cells.keys()) {
        const cell = row.appendChild(element('td', '', kinds[index]));
        cell.dataset.label = labels[index];
        if (index === 0 && press) {
          const button = cell.appendChild(element('button'));
          button.type = 'button';
          button.addEventListener('click', () => press());
        } else if (make[index]) {
          cell.appendChild(make[index]());
        }
      }
    }
    cells.forEach((value, index) => {
      const cell = row.children[index];
      const place = cell.firstElementChild ?? cell;
      if (place instanceof HTMLMeterElement) place.value = value;
      else if (place.textContent !== value) place.textContent = value;
    });
    if (row === at) at = at.nextElementSibling;
    else body.insertBefore(row, at);
  }
  for (const row of known.values()) row.remove();
  if (focus !== document.activeElement && body.contains(focus)) focus.focus({preventScroll: true});
}

function showServices(services) {
  for (const [name, isKnown] of [['rate', services.countsConnections], ['open', services.hasOpen]]) {
    document.querySelector(`th.${name}`).hidden = !isKnown;
  }
  fill($('services'), services.rows.map((row) => {
    const more = row.moreAddresses ? ` and ${row.moreAddresses} more` : '';
    const cells = [
      row.text, `${row.address}/${row.protocol}${more}`, row.kinds.join(', '),
      row.endpoints ? numbers.format(row.endpoints) : row.whenEmpty,
    ];
    const kinds = ['', '', 'wide', 'number'];
    if (services.countsConnections) cells.push(rate(row.rate));
    if (services.hasOpen) cells.push(rate(row.open));
    kinds.push('number', 'number');
    return {key: row.key, cells, kinds, press: () => open(row.service)};
  }));
  const shown = services.rows.length;
  $('count').textContent = shown < services.found
    ? `${numbers.format(services.found)} of ${numbers.format(services.total)} found, the first ${shown} shown: search for others`
    : `${numbers.format(services.found)} of ${numbers.format(services.total)}`;
}

function showNode(measures) {
  const facts = [
    ['Version', measures.release],
    ['Last sync', ago(measures.lastSyncSeconds)],
    ['Services', numbers.format(measures.services)],
    ['Warnings', numbers.format(measures.warnings)],
  ];
  if (measures.pending) facts.push(['Not in the kernel yet', `${numbers.format(measures.pending)} changes`]);
  if (measures.degraded) facts.push(['Over quota', `${numbers.format(measures.degraded)} Services`]);
  if (measures.unserved.length) facts.push(['Not served', measures.unserved.join(', ')]);
  $('node').replaceChildren(...facts.flatMap(([name, value]) => [element('dt', name), element('dd', value)]));
  fill($('maps'), measures.maps.map((map) => ({
    key: map.name,
    cells: [map.name, map.entries / Math.max(map.capacity, 1), `${numbers.format(map.entries)} of ${numbers.format(map.capacity)}`],
    kinds: ['', '', 'number'],
  })), {1: () => Object.assign(element('meter'), {max: 1, high: 0.9})});
  fill($('watches'), measures.watches.map((watch) => ({
    key: watch.kind,
    cells: [watch.kind, watch.isConnected ? 'connected' : `disconnected, ${numbers.format(watch.errors)} errors`, ago(watch.eventSeconds)],
    kinds: ['', '', 'number'],
  })));
  $('has-flows').hidden = !measures.flows.length;
  fill($('flows'), measures.flows.map((flows) => ({
    key: `${flows.protocol} ${flows.state}`,
    cells: [flows.protocol, flows.state, numbers.format(flows.count)],
    kinds: ['', '', 'number'],
  })));
}

function showVerdicts(verdicts) {
  const sum = (start) => verdicts.filter((v) => v.name.startsWith(start)).reduce((all, v) => all + (v.rate ?? 0), 0);
  if (verdicts.some((verdict) => verdict.rate !== null)) {
    history.push({at: Date.now(), refused: sum('refused_'), dropped: sum('dropped_')});
    history.splice(0, history.length - HISTORY);
  }
  const highest = Math.max(0, ...history.flatMap((look) => [look.refused, look.dropped]));
  for (const kind of ['refused', 'dropped']) {
    const step = 300 / Math.max(history.length - 1, 1);
    const points = history.map((look, n) => `${(n * step).toFixed(1)},${(58 - 56 * look[kind] / Math.max(highest, 1)).toFixed(1)}`);
    $(kind).setAttribute('points', points.join(' '));
  }
  const minutes = history.length ? Math.ceil((Date.now() - history[0].at) / 60000) : 0;
  $('chart').textContent = history.length
    ? `the last ${minutes} min; dropped (solid) and refused (dashed), ${numbers.format(highest)}/s at most`
    : 'since this page was opened';
  const some = verdicts.filter((verdict) => verdict.total > 0);
  $('verdicts').parentElement.hidden = !some.length;
  if (!some.length) $('chart').textContent = 'nothing has been refused or dropped';
  some.sort((a, b) => (b.rate ?? 0) - (a.rate ?? 0) || b.total - a.total);
  fill($('verdicts'), some.map((verdict) => ({
    key: verdict.name,
    cells: [verdict.meaning, rate(verdict.rate), numbers.format(verdict.total)],
    kinds: ['', 'number', 'number'],
  })));
}

function list(lines, kind) {
  const made = element('ul', '', kind);
  made.append(...lines.map((line) => element('li', line)));
  return made;
}

function showPort(port) {
  const table = element('table', '', 'stacked');
  const head = table.createTHead().insertRow();
  const titles = ['Endpoint', 'Node', 'State', ...port.sets.map((set) => `${set} set`)];
  head.append(...titles.map((title) => Object.assign(element('th', title), {scope: 'col'})));
  const body = table.createTBody();
  for (const endpoint of port.endpoints) {
    const places = endpoint.places.map(({share, why}) => (share === null ? `out: ${why}` : `in, ${percent(share)}`));
    const cells = [endpoint.address, endpoint.node, endpoint.state, ...places].map((text) => element('td', text));
    cells.forEach((cell, index) => { cell.dataset.label = titles[index]; });
    body.insertRow().append(...cells);
  }
  const parts = [element('h3', port.text), list(port.frontends)];
  if (port.why.length) parts.push(list(port.why));
  parts.push(port.endpoints.length ? table : element('p', 'no endpoints', 'bad'));
  if (port.moreEndpoints) parts.push(element('p', `and ${numbers.format(port.moreEndpoints)} more`));
  return parts;
}

function showDetail(detail) {
  if (detail.service !== asked()) return;
  $('detail-name').textContent = detail.text;
  const parts = detail.isKnown
    ? [list(detail.facts), ...detail.ports.flatMap(showPort)]
    : [element('p', 'the daemon knows no Service of this name', 'bad')];
  if (detail.warnings.length) parts.splice(1, 0, list(detail.warnings, 'bad'));
  $('detail-body').replaceChildren(...parts);
}

function show(state) {
  clearTimeout(lost);
  lost = 0;
  $('status').textContent = `live, ${new Date().toLocaleTimeString('en-GB')}`;
  $('status').className = '';
  showServices(state.services);
  showVerdicts(state.verdicts);
  if (state.measures) showNode(state.measures);
  if (state.detail) showDetail(state.detail);
}

function trouble(text) {
  $('status').textContent = text;
  $('status').className = 'bad';
}

// Streams end now and then, and the browser asks again by itself, unless it was refused.
function lose() {
  lost ||= setTimeout(() => {
    lost = 0;
    trouble('the daemon does not answer; trying again');
    if (source?.readyState === EventSource.CLOSED) connect();
  }, LOST_MS);
}

// Nothing is asked for while nobody looks.
function connect() {
  clearTimeout(lost);
  lost = 0;
  source?.close();
  source = null;
  if (paused || document.hidden) return;
  const query = new URLSearchParams({search: $('search').value, order: $('order').value});
  if (asked()) query.set('service', asked());
  source = new EventSource(`page/events?${query}`);
  source.addEventListener('state', (event) => show(JSON.parse(event.data)));
  source.addEventListener('trouble', (event) => trouble(JSON.parse(event.data)));
  source.addEventListener('error', lose);
}

function open(service) {
  location.hash = encodeURIComponent(service);
}

function follow() {
  const service = asked();
  $('detail').hidden = !service;
  if (service) {
    $('detail-name').textContent = 'asking the daemon';
    $('detail-body').replaceChildren();
    $('detail-name').focus();
  }
  connect();
}

function close() {
  const service = asked();
  if (!service) return;
  location.hash = '';
  const row = [...$('services').children].find((each) => each.dataset.key.startsWith(`${service} `));
  (row?.querySelector('button') ?? $('search')).focus();
}

function pause() {
  paused = !paused;
  $('pause').setAttribute('aria-pressed', String(paused));
  if (paused) $('status').textContent = 'paused';
  connect();
}

$('ask').addEventListener('submit', (event) => event.preventDefault());
$('search').addEventListener('input', () => {
  clearTimeout(wait);
  wait = setTimeout(connect, ENOUGH_MS);
});
$('order').addEventListener('change', connect);
$('pause').addEventListener('click', pause);
$('close').addEventListener('click', close);
document.addEventListener('visibilitychange', connect);
window.addEventListener('hashchange', follow);
document.addEventListener('keydown', (event) => {
  const isTyping = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Escape') close();
  else if (event.key === '/' && !isTyping) {
    event.preventDefault();
    $('search').focus();
  } else if (event.key === 'p' && !isTyping) pause();
});
follow();
