-- Remove hints whose jobs wait no longer, unless somebody has scored them anew since they were taken.
-- KEYS[1] queue: sorted set, job id -> due time (ms)
-- ARGV[1] prefix of the payload keys
-- ARGV[2…] for each claim: the score that it wrote, how many ids, job ids
-- returns how many hints were removed
local PAGE = 1000 -- ids in one call: Lua's stack holds some thousands
local dropped = 0
local at = 2
while at < #ARGV do
  local ours, last = tonumber(ARGV[at]), at + 1 + ARGV[at + 1]
  for first = at + 2, last, PAGE do
    local hints, payloads = {}, {}
    local scores = redis.call('ZMSCORE', KEYS[1], unpack(ARGV, first, math.min(first + PAGE - 1, last)))
    for n, score in ipairs(scores) do
      local id = ARGV[first + n - 1]
      if score and tonumber(score) == ours then
        hints[#hints + 1] = id
        payloads[#payloads + 1] = ARGV[1] .. id
      elseif not score then -- the hint was evicted: its payload is of no use to anybody
        payloads[#payloads + 1] = ARGV[1] .. id
      end
    end
    if #hints > 0 then
      dropped = dropped + redis.call('ZREM', KEYS[1], unpack(hints))
    end
    if #payloads > 0 then
      redis.call('DEL', unpack(payloads))
    end
  end
  at = last + 1
end
return dropped
