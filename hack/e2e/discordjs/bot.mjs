// A discord.js bot for the end-to-end tests. It is told what to do by lines of JSON on its standard
// input and tells what it sees by lines of JSON on its standard output.
//   node bot.mjs <REST base without version>    with the token in BOT_TOKEN
import { createInterface } from 'node:readline';
import { Client, Events, GatewayIntentBits } from 'discord.js';

const tell = (event, fields = {}) => process.stdout.write(JSON.stringify({ event, ...fields }) + '\n');

const client = new Client({
  intents: [GatewayIntentBits.Guilds, GatewayIntentBits.GuildMessages, GatewayIntentBits.MessageContent],
  rest: { api: process.argv[2], version: '10' },
});

client.on(Events.ClientReady, () => tell('ready', {
  guilds: client.guilds.cache.map((g) => ({
    id: g.id, name: g.name, available: g.available, channels: g.channels.cache.map((c) => c.name),
  })),
}));
client.on(Events.MessageCreate, (m) => tell('message', { content: m.content, author: m.author.username }));
client.on(Events.ShardResume, (id, replayed) => tell('resumed', { replayed }));
client.on(Events.ShardReconnecting, () => tell('reconnecting'));
client.on(Events.ShardReady, () => tell('identified'));
client.on(Events.ShardDisconnect, (e) => tell('disconnected', { code: e.code }));
client.on(Events.Error, (e) => tell('error', { message: e.message }));
client.on(Events.ShardError, (e) => tell('error', { message: e.message }));
process.on('unhandledRejection', (e) => tell('failed', { message: String(e) }));

// The WebSocket that the library has open, for the test to cut.
function socket() {
  const manager = client.ws._ws ?? Object.values(client.ws).find((v) => v?.strategy);
  const shard = manager.strategy.shards.first();
  return (shard.connection ?? Object.values(shard).find((v) => v?._socket))._socket;
}

const commands = {
  async send({ channel, contents }) {
    const target = client.channels.cache.find((c) => c.name === channel);
    for (const content of contents) await target.send(content);
    tell('sent');
  },
  cut() { socket().destroy(); tell('cut'); },
  async quit() { await client.destroy(); process.exit(0); },
};

createInterface({ input: process.stdin }).on('line', async (line) => {
  const { command, ...rest } = JSON.parse(line);
  try {
    await commands[command](rest);
  } catch (e) {
    tell('failed', { command, message: String(e?.stack ?? e) });
  }
}).on('close', () => process.exit(0));

await client.login(process.env.BOT_TOKEN);
